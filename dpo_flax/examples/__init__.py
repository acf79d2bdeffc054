"""What configs/tiny.py trains on, and how it was made."""
