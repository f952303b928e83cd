"""emit() and sources."""
