"""What both containers of a shard have in common: how a writer takes samples, and where it says that payloads lie."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from shared.codec import Codec


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredArray:
    """One array as a shard keeps it: a latent, or the embedding of one caption."""

    payload: bytes
    """Made by ``shared.cache.payload.encode``."""
    codec: Codec
    shape: tuple[int, ...]
    """Of the array that was encoded: (C, T, H, W) or (L, D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Where a payload lies inside its shard."""

    offset: int
    """Of the first payload byte, from the start of the shard."""
    num_bytes: int
    crc32c: int


class ShardFile(Protocol):
    """Writes samples one after another into an open file; equal samples give equal bytes."""

    def add(
        self, key: str, streams: Mapping[str, Sequence[StoredArray]], description: bytes
    ) -> dict[str, list[Extent]]:
        """Appends one sample and returns where each of its payloads lies.

        Args:
            key: The sample's name: 32 hex digits.
            streams: Its arrays by stream, e.g. ``latent`` with one and ``text.t5`` with one a caption. A shard's
                samples may have some of the streams only.
            description: The sample's JSON, for readers without the index.
        """

    def finish(self) -> tuple[str, int]:
        """Completes the shard and returns the SHA-256 of its bytes and their number. The file stays open."""


class HashingFile:
    """A write-only file that knows its length and its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Appends ``data``."""
        self._file.write(data)
        self.sha256.update(data)
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        """Returns the bytes written so far."""
        return self._length
