"""Paths, and files that are written and read with care."""
