"""The saved steps of a run."""
