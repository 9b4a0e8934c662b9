"""Stage 2: a cache of latents and text embeddings trains a video diffusion transformer."""
