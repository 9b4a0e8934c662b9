"""What a cache will cost, before it is made."""
