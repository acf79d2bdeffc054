"""Preferences -> token ids."""
