"""What is learned, step by step."""
