"""What spreads training over ranks. The models know nothing of it."""
