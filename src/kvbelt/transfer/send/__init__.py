"""The sending side of the belt."""
