"""Chat templates, run in a sandbox with a bound on time and memory."""
