"""What both stages and the estimator agree on: sizes, media, the cache format, the encoders."""
