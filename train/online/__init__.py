"""The second source of batches: clips are decoded, T5 and the autoencoder run, while the model trains."""
