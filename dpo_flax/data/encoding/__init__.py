"""Text -> token ids, in this process or in several."""
