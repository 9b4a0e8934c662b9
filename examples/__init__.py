"""The demo, and what it needs."""
