"""The work and the memory of a compiled program, read from its text."""
