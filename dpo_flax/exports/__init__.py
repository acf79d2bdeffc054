"""A trained policy -> directories that other programs load."""
