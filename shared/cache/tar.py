"""A tar shard that any WebDataset reader understands, written so that equal samples give equal bytes.

A sample ``KEY`` has one member a stream, named ``KEY.<stream>``, and ``KEY.json`` with what is needed to decode them.
No time stamps, owners or other traces of the machine are kept.
"""

import hashlib
import io
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Where a payload lies inside its shard."""

    offset: int
    """Of the first payload byte, from the start of the shard."""
    num_bytes: int
    crc32c: int


class TarShardWriter:
    """Writes samples one after another into an open file.

    Args:
        file: Opened for writing, empty; stays open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = _HashingFile(file)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def add(self, key: str, members: dict[str, bytes]) -> dict[str, Extent]:
        """Appends one sample and returns where each of its members lies.

        Args:
            key: The sample's name; no dots or slashes.
            members: Payload by extension, in the order in which they are written.
        """
        assert not set(key) & set("./"), key
        extents = {}
        for extension, payload in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(payload)
            header.mode = 0o644
            offset = self._file.tell() + tarfile.BLOCKSIZE
            self._tar.addfile(header, io.BytesIO(payload))
            extents[extension] = Extent(offset=offset, num_bytes=len(payload), crc32c=google_crc32c.value(payload))
        return extents

    def finish(self) -> tuple[str, int]:
        """Closes the archive and returns the SHA-256 of its bytes and their number."""
        self._tar.close()
        return self._file.sha256.hexdigest(), self._file.tell()


class _HashingFile:
    """A write-only file that knows its length and its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length
