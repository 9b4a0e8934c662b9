"""A tar shard that any WebDataset reader understands, written so that equal samples give equal bytes.

A sample ``KEY`` has one member a stream, named ``KEY.<stream>``, and ``KEY.json`` with what is needed to decode them;
the payloads of several captions stand one behind another in one member. No time stamps, owners or other traces of the
machine are kept.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import google_crc32c

from shared.cache.shard_file import Extent, HashingFile, StoredArray


class TarShardWriter:
    """A :class:`~shared.cache.shard_file.ShardFile` in a tar.

    Args:
        file: Opened for writing, empty; stays open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = HashingFile(file)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def add(
        self, key: str, streams: Mapping[str, Sequence[StoredArray]], description: bytes
    ) -> dict[str, list[Extent]]:
        """Appends one sample, see ``ShardFile.add``."""
        assert not set(key) & set("./"), key
        extents: dict[str, list[Extent]] = {}
        for stream, arrays in streams.items():
            offset = self._add_member(f"{key}.{stream}", b"".join(array.payload for array in arrays))
            extents[stream] = []
            for array in arrays:
                crc32c = google_crc32c.value(array.payload)
                extents[stream].append(Extent(offset=offset, num_bytes=len(array.payload), crc32c=crc32c))
                offset += len(array.payload)
        self._add_member(f"{key}.json", description)
        return extents

    def _add_member(self, name: str, content: bytes) -> int:
        """Returns the offset of the member's first byte."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        header.mode = 0o644
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(header, io.BytesIO(content))
        return offset

    def finish(self) -> tuple[str, int]:
        """Closes the archive and returns the SHA-256 of its bytes and their number."""
        self._tar.close()
        return self._file.sha256.hexdigest(), self._file.tell()
