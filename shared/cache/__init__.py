"""The cache format: provenance, index, shards and codecs. See docs/cache_format.md."""
