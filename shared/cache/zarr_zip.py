"""A Zarr shard: one Zarr v3 group in one zip file, written front to back so that equal samples give equal bytes.

Latents of a shard stand in one array with a chunk a sample; every caption is an array of one chunk. So each payload is
one contiguous piece of the file, the same bytes as in a tar shard, and readers by offset need to know nothing of Zarr.
docs/zarr.md describes the file and says why it is laid out so.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import google_crc32c

from shared.cache.shard_file import Extent, HashingFile, StoredArray
from shared.cache.zarr_layout import ShardOutline, ZipEntry, zip_directory
from shared.errors import InputError


class ZarrShardWriter:
    """Writes samples one after another into an open file; fulfils ``shared.cache.shard_file.ShardFile``.

    Only metadata is kept in memory: some hundred bytes a payload and the samples' descriptions.

    Args:
        file: Opened for writing, empty; stays open. It is written once, front to back, and never read or sought.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = HashingFile(file)
        self._outline = ShardOutline()
        self._entries: list[ZipEntry] = []

    def add(
        self, key: str, streams: Mapping[str, Sequence[StoredArray]], description: bytes
    ) -> dict[str, list[Extent]]:
        """Appends one sample and returns where each of its payloads lies, without the checksum that follows it.

        Args:
            key: The sample's name: 32 hex digits.
            streams: Its arrays by stream: of a stream of texts at least one, of any other exactly one, of the same
                shape and codec as in the samples before.
            description: The sample's JSON object; becomes part of the group's attributes.
        """
        assert isinstance(json.loads(description), dict), description
        kinds = {stream: [(array.codec, array.shape) for array in arrays] for stream, arrays in streams.items()}
        names = self._outline.add(key, kinds, description.decode())
        return {
            stream: [self._put_payload(name, array.payload) for name, array in zip(names[stream], arrays, strict=True)]
            for stream, arrays in streams.items()
        }

    def finish(self) -> tuple[str, int]:
        """Writes the metadata and returns the SHA-256 of the file's bytes and their number."""
        for name, document in self._outline.documents():
            self._put(name, document)
        self._file.write(zip_directory(self._entries, self._file.tell()))
        return self._file.sha256.hexdigest(), self._file.tell()

    def _put_payload(self, name: str, payload: bytes) -> Extent:
        crc32c = google_crc32c.value(payload)
        offset = self._put(name, payload, struct.pack("<L", crc32c))
        return Extent(offset=offset, num_bytes=len(payload), crc32c=crc32c)

    def _put(self, name: str, *parts: bytes) -> int:
        """Appends one entry and returns the offset of its data."""
        crc32 = 0
        for part in parts:
            crc32 = zlib.crc32(part, crc32)
        entry = ZipEntry(name=name, offset=self._file.tell(), num_bytes=sum(map(len, parts)), crc32=crc32)
        self._entries.append(entry)
        self._file.write(entry.local_header())
        offset = self._file.tell()
        for part in parts:
            self._file.write(part)
        return offset


_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_FLAG_ENCRYPTED = 0x1
_FLAG_UTF8 = 0x800


def read_directory(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Returns where the data of each entry of a shard lies: name -> (offset, bytes), in the order of the file.

    Args:
        file: Opened for reading; may come from anyone.

    Raises:
        InputError: It is not a zip file as :class:`ZarrShardWriter` makes them: damaged, with names that lead out of
            the folder, doubled names, compressed or encrypted entries, or entries that overlap one another.
    """
    try:  # a version of the format that the library does not know is NotImplementedError
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise InputError(f"not a readable zip file ({error}): expected a Zarr shard; encode it again") from None
    directory: dict[str, tuple[int, int]] = {}
    free_from = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        _check_entry(info)
        if info.orig_filename in directory:
            raise _refusal(info, "stands in the zip file twice")
        if info.header_offset < free_from:
            raise _refusal(info, "overlaps the entry before it")
        offset = _data_offset(file, info)
        free_from = offset + info.compress_size
        if free_from > archive.start_dir:
            raise _refusal(info, "reaches beyond the data of the file")
        directory[info.orig_filename] = (offset, info.compress_size)
    return directory


def _check_entry(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    if {"", ".", ".."} & set(name.split("/")) or not name.isprintable() or set(name) & set("\\:"):
        raise _refusal(info, "is not a relative path inside the shard")
    if info.flag_bits & _FLAG_ENCRYPTED:
        raise _refusal(info, "is encrypted, expected plain")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _refusal(info, "is compressed, expected stored")


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(max(info.header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    if info.header_offset < 0 or len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise _refusal(info, "has no header where the directory says, expected one")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    name = file.read(name_bytes).decode("utf-8" if info.flag_bits & _FLAG_UTF8 else "cp437", errors="replace")
    if name != info.orig_filename:
        raise _refusal(info, f"is named {name!r} in its own header")
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _refusal(info: zipfile.ZipInfo, fault: str) -> InputError:
    return InputError(f"zip entry {info.orig_filename!r} {fault}: not a shard of ours; encode it again")
