"""The token cache on disk: its files, and how it is built."""
