"""Draws the generated parts of the documentation. Not part of the wheel."""
