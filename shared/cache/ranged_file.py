"""A large object of a store as a file: what is read of it is fetched, not the whole."""

import io
import os

from shared.stores.store import Store

_TAIL_BYTES = 1 << 20
"""Fetched first: the end of a Parquet file, which says where its columns lie."""
_AHEAD_BYTES = 1 << 18


class RangedFile(io.RawIOBase):
    """Reads an object by ranges; small reads next to one another share one.

    Args:
        store: Where it lies.
        path: Its path below the store's root.

    Raises:
        FileNotFoundError: if it is not there.
    """

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        size = store.size(path)
        if size is None:
            raise FileNotFoundError(f"{store.url}: no object {path}")
        self._store, self._path, self._size, self._position = store, path, size, 0
        self._start = max(0, size - _TAIL_BYTES)
        self._buffer = store.read_range(path, self._start, size - self._start)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to another position, see ``io.IOBase.seek``."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next ``size`` bytes, fewer only where the object ends."""
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        begin = self._position - self._start
        if begin < 0 or begin + length > len(self._buffer):
            self._start, begin = self._position, 0
            ahead = min(max(length, _AHEAD_BYTES), left)
            self._buffer = self._store.read_range(self._path, self._start, ahead)
        self._position += length
        return self._buffer[begin : begin + length]
