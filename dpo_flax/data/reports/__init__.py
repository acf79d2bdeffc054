"""What can be said of prepared data: numbers, examples, as text and as a page."""
