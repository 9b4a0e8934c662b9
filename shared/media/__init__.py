"""Manifests, probing and decoding of video."""
