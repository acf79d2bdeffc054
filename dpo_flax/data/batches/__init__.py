"""Token ids -> rows."""
