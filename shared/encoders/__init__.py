"""The frozen encoders: T5 for captions, a VAE for frames."""
