"""The receiving side of the belt."""
