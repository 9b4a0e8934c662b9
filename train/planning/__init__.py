"""What a run will take, found without a GPU: memory, tokens, arithmetic."""
