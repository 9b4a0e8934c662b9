"""Stage 1: a manifest of clips becomes a cache of T5 embeddings and VAE latents."""
