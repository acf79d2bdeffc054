"""Processes: how a command starts, meets its peers and ends."""
