"""A config -> the parts of a run."""
