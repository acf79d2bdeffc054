"""The learning rule: what is trainable, the optimizer and the jitted step."""
