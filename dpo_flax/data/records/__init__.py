"""Files -> preferences."""
