"""Parts of files and of objects as seekable files."""

import io
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

from shared.media.refusal import MediaError

BLOCK_BYTES = 2 * 1024 * 1024
BLOCKS_AHEAD = 4
"""Blocks a request once reading goes forwards."""
BLOCKS_KEPT = 16
"""32 MiB: containers go back and forth between their streams and tables."""


class PartFile(io.RawIOBase):
    """Some bytes of something, as a file that can be read and sought.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        count = self._read_into(self._position, wanted) if wanted.nbytes else 0
        self._position += count
        return count

    @abstractmethod
    def _read_into(self, position: int, wanted: memoryview) -> int:
        """Fills the beginning of ``wanted`` with the bytes from a position on; returns how many, at least one."""


class FileWindow(PartFile):
    """A part of an open file, which is closed with it."""

    def __init__(self, file: BinaryIO, *, offset: int, size: int) -> None:
        super().__init__(size)
        self._file, self._offset = file, offset

    def _read_into(self, position: int, wanted: memoryview) -> int:
        self._file.seek(self._offset + position)
        content = self._file.read(wanted.nbytes)
        wanted[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class RangedFile(PartFile):
    """A part of an object, read in blocks, of which the latest are kept.

    Args:
        read: Returns the object's bytes from a start up to an end, or raises.
        offset: The first byte of the object that belongs to the file.
        size: Its bytes.
        block_bytes: Read at least so much at once.
        blocks_ahead: And so many blocks once reading goes forwards.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        *,
        offset: int,
        size: int,
        block_bytes: int = BLOCK_BYTES,
        blocks_ahead: int = BLOCKS_AHEAD,
    ) -> None:
        super().__init__(size)
        self._read, self._offset = read, offset
        self._block_bytes, self._blocks_ahead = block_bytes, blocks_ahead
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._latest = -1

    def _read_into(self, position: int, wanted: memoryview) -> int:
        number, start = divmod(position, self._block_bytes)
        part = memoryview(self._block(number))[start : start + wanted.nbytes]
        wanted[: part.nbytes] = part
        return part.nbytes

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            ahead = self._blocks_ahead if number == self._latest + 1 else 1
            start, end = number * self._block_bytes, min((number + ahead) * self._block_bytes, self._size)
            content = self._read(self._offset + start, self._offset + end)
            if len(content) != end - start:
                raise MediaError("not_reachable", f"{len(content)} bytes where {end - start} were", transient=True)
            for place in range(0, len(content), self._block_bytes):
                self._blocks[number + place // self._block_bytes] = content[place : place + self._block_bytes]
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        self._latest = number
        return self._blocks[number]
