"""What people run: the launcher, the demo model and the tools around them."""
