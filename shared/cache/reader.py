"""Reading single payloads out of shards, by the places that the index gives."""

import os
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from shared.cache import codecs
from shared.errors import InputError


class StreamReader:
    """Reads and checks payloads. Cheap to build and to pickle: shards are opened when first asked for, in each process.

    Args:
        root: The cache's folder.
        max_open_shards: File descriptors kept open; the one opened first is closed first.
    """

    def __init__(self, root: Path, max_open_shards: int = 64) -> None:
        self._root, self._max_open_shards = root, max_open_shards
        self._descriptors: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root, "_max_open_shards": self._max_open_shards, "_descriptors": {}}

    def payload(self, entry: dict[str, Any]) -> bytes:
        """Returns the stored bytes of one stream of one sample.

        Args:
            entry: The stream's struct in the index: ``shard``, ``offset``, ``bytes``, ``crc32c``.

        Raises:
            InputError: naming shard and offset, if the shard is missing or short, or the checksum differs.
        """
        where = f"{self._root / entry['shard']}, offset {entry['offset']}"
        try:
            data = os.pread(self._open(entry["shard"]), entry["bytes"], entry["offset"])
        except FileNotFoundError:
            raise InputError(f"{where}: the shard is missing: run preprocess.verify") from None
        if len(data) != entry["bytes"]:
            raise InputError(f"{where}: found {len(data)} bytes, expected {entry['bytes']}: the shard is cut short")
        found = google_crc32c.value(data)
        if found != entry["crc32c"]:
            raise InputError(f"{where}: found CRC32C {found:08x}, expected {entry['crc32c']:08x}: the shard is corrupt")
        return data

    def latent(self, entry: dict[str, Any]) -> torch.Tensor:
        """Returns a latent (C, T, H, W) in its codec's type, normalised as the provenance says."""
        return codecs.decode(self.payload(entry), entry["codec"], entry["shape"])

    def text(self, entry: dict[str, Any]) -> list[torch.Tensor]:
        """Returns the embeddings (L, D) of every caption of a sample, without padding, in the codec's type."""
        lengths = list(entry["num_tokens"])
        packed = codecs.decode(self.payload(entry), entry["codec"], (sum(lengths), entry["channels"]))
        return list(packed.split(lengths))

    def close(self) -> None:
        """Closes the shards that are open."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, shard: str) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= self._max_open_shards:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self._root / shard, os.O_RDONLY)
        return self._descriptors[shard]
