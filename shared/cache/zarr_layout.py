"""What a Zarr shard consists of: names, metadata documents, zip records, and from them its size. Pure.

The writer and the estimator both build a shard from here, so a size that is predicted is the size that is written.
zarr.json documents: Zarr v3 core specification (zarr-specs.readthedocs.io); zip records: PKWARE's APPNOTE 6.3.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.cache.layout import is_text
from shared.codec import Codec, stored_dtype, stored_shape

FORMAT = "latentmill-shard"
VERSION = 2
CHECKSUM_BYTES = 4
"""Zarr's crc32c codec puts these after the payload."""
KEY_DIGITS = 32

_ZIP64_LIMIT = 0xFFFFFFFF
_ZIP64_LIMIT_ENTRIES = 0xFFFF
_MIDNIGHT_1980 = (0, 0x0021)
_MODE = 0o100644 << 16
_GROUP = '{"zarr_format":3,"node_type":"group","attributes":{}}'
_CONSOLIDATED_GROUP = (
    '{"zarr_format":3,"node_type":"group","attributes":{},'
    '"consolidated_metadata":{"kind":"inline","must_understand":false,"metadata":{}}}'
)

ArrayKind = tuple[Codec, tuple[int, ...]]
"""The codec of an array and its shape before encoding: (C, T, H, W) or (L, D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadSize:
    """One array of a shard, without its bytes."""

    codec: Codec
    shape: tuple[int, ...]
    """Of the array that is encoded: (C, T, H, W) or (L, D)."""
    num_bytes: int
    """Of the payload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSize:
    """One sample of a shard, without its bytes."""

    streams: Mapping[str, Sequence[PayloadSize]]
    description_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanStream:
    """The arrays of one stream, on average over the samples of a shard."""

    codec: Codec
    shape: tuple[int, ...]
    """Of a typical array, rounded to whole numbers."""
    mean_bytes: float
    """Of a payload."""
    arrays_per_sample: float = 1.0


def zarr_shard_bytes(samples: Sequence[SampleSize]) -> int:
    """Returns the bytes of a shard of these samples in this order, exactly."""
    outline = ShardOutline()
    entries: list[ZipEntry] = []
    position = 0

    def put(name: str, num_bytes: int) -> None:
        nonlocal position
        entries.append(ZipEntry(name=name, offset=position, num_bytes=num_bytes, crc32=0))
        position += len(entries[-1].local_header()) + num_bytes

    for number, sample in enumerate(samples):
        kinds = {stream: [(size.codec, size.shape) for size in sizes] for stream, sizes in sample.streams.items()}
        names = outline.add(f"{number:0{KEY_DIGITS}x}", kinds, " " * sample.description_bytes)
        for stream, sizes in sample.streams.items():
            for name, size in zip(names[stream], sizes, strict=True):
                put(name, size.num_bytes + CHECKSUM_BYTES)
    for name, document in outline.documents():
        put(name, len(document))
    return position + len(zip_directory(entries, position))


def mean_zarr_shard_bytes(num_samples: int, streams: Mapping[str, MeanStream], mean_description_bytes: float) -> float:
    """Returns the bytes of a shard of which only averages are known, within some parts in a thousand.

    Args:
        num_samples: Of the shard.
        streams: The arrays of an average sample by stream.
        mean_description_bytes: Of a sample's JSON.
    """

    def empty_arrays(stream: MeanStream, number: int) -> list[PayloadSize]:
        first, end = (int(position * stream.arrays_per_sample + 1e-9) for position in (number, number + 1))
        return [PayloadSize(codec=stream.codec, shape=stream.shape, num_bytes=0)] * (end - first)

    samples = []
    for number in range(num_samples):
        arrays = {name: empty_arrays(stream, number) for name, stream in streams.items()}
        present = {name: sizes for name, sizes in arrays.items() if sizes}
        samples.append(SampleSize(streams=present, description_bytes=0))
    mean_sample = mean_description_bytes + sum(
        stream.arrays_per_sample * stream.mean_bytes for stream in streams.values()
    )
    return zarr_shard_bytes(samples) + num_samples * mean_sample


class ShardOutline:
    """The names and the metadata of a shard, as its samples become known one after another."""

    def __init__(self) -> None:
        self._samples: list[str] = []
        self._streams: dict[str, list[ArrayKind]] = {}

    def add(self, key: str, streams: Mapping[str, Sequence[ArrayKind]], description: str) -> dict[str, list[str]]:
        """Returns the names of the zip entries that hold the payloads of one more sample, by stream.

        Args:
            key: The sample's name: 32 hex digits.
            streams: Its arrays by stream: of a stream of texts at least one, of any other exactly one, of the same
                shape and codec as the samples before.
            description: The sample's JSON.
        """
        assert len(key) == KEY_DIGITS, f"{key!r}: expected {KEY_DIGITS} hex digits"
        places: dict[str, list[int]] = {}
        names: dict[str, list[str]] = {}
        for stream, kinds in streams.items():
            assert kinds, f"sample {key}: stream {stream} without arrays"
            assert all(min(shape) > 0 for _, shape in kinds), f"sample {key}: stream {stream} has an empty array"
            earlier = self._streams.setdefault(stream, [])
            places[stream] = list(range(len(earlier), len(earlier) + len(kinds)))
            earlier.extend(kinds)
            if is_text(stream):
                names[stream] = [
                    _chunk(f"{stream}/{place}", (0,) * len(stored_shape(*kind)))
                    for place, kind in zip(places[stream], kinds, strict=True)
                ]
            else:
                (kind,) = kinds
                assert kind == earlier[0], f"sample {key}: {stream} is {kind}, others of the shard are {earlier[0]}"
                names[stream] = [_chunk(stream, (*places[stream], *(0,) * len(stored_shape(*kind))))]
        self._samples.append(f'{{"key":"{key}","streams":{_compact(places)},"description":{description}}}')
        return names

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Yields the metadata as names and contents of zip entries, the root with all of it last."""
        consolidated: list[str] = []

        def take(path: str, document: str, consolidated_as: str | None = None) -> tuple[str, bytes]:
            consolidated.append(f'"{path}":{consolidated_as or document}')
            return f"{path}/zarr.json", document.encode()

        for stream, kinds in self._streams.items():
            if not is_text(stream):
                yield take(stream, _compact(array_document(*kinds[0], num_stacked=len(kinds))))
                continue
            yield take(stream, _GROUP, _CONSOLIDATED_GROUP)
            for place, kind in enumerate(kinds):
                yield take(f"{stream}/{place}", _compact(array_document(*kind)))
        root = (
            f'{{"zarr_format":3,"node_type":"group","attributes":{{"format":"{FORMAT}","version":{VERSION},'
            f'"samples":[{",".join(self._samples)}]}},'
            '"consolidated_metadata":{"kind":"inline","must_understand":false,'
            f'"metadata":{{{",".join(consolidated)}}}}}}}'
        )
        yield "zarr.json", root.encode()


def array_document(codec: Codec, shape: tuple[int, ...], *, num_stacked: int | None = None) -> dict[str, Any]:
    """Returns the zarr.json of an array, as zarr-python writes it.

    Args:
        codec: Of the payloads.
        shape: Of what is encoded: (C, T, H, W) or (L, D).
        num_stacked: Payloads that stand in the array, one a chunk, along a first axis of their own; None: the array
            is one payload, without such an axis.
    """
    payload_shape, dtype = stored_shape(codec, shape), stored_dtype(codec)
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if dtype not in ("int8", "uint8"):
        to_bytes["configuration"] = {"endian": "little"}
    zstd = [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}] if codec.zstd else []
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": payload_shape if num_stacked is None else (num_stacked, *payload_shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": payload_shape if num_stacked is None else (1, *payload_shape)},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [to_bytes, *zstd, {"name": "crc32c"}],
        "attributes": {"codec": str(codec), "shape": shape},
        "storage_transformers": [],
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipEntry:
    """One stored entry of a zip file."""

    name: str
    offset: int
    """Of its local header."""
    num_bytes: int
    """Of its data; under 4 GiB."""
    crc32: int

    def local_header(self) -> bytes:
        """Returns what stands before the data."""
        assert self.num_bytes < _ZIP64_LIMIT, f"{self.name} has {self.num_bytes} bytes"
        fixed = struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, 0, 0, *_MIDNIGHT_1980, self.crc32, self.num_bytes, self.num_bytes,
            len(self.name), 0,
        )  # fmt: skip
        return fixed + self.name.encode("ascii")

    def directory_record(self) -> bytes:
        """Returns the entry's record in the central directory; zip64 where its offset needs it."""
        far = self.offset >= _ZIP64_LIMIT
        extra = struct.pack("<HHQ", 1, 8, self.offset) if far else b""
        version = 45 if far else 20
        fixed = struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 3 << 8 | version, version, 0, 0, *_MIDNIGHT_1980, self.crc32,
            self.num_bytes, self.num_bytes, len(self.name), len(extra), 0, 0, 0, _MODE, min(self.offset, _ZIP64_LIMIT),
        )  # fmt: skip
        return fixed + self.name.encode("ascii") + extra


def zip_directory(entries: Sequence[ZipEntry], offset: int) -> bytes:
    """Returns the central directory and the records that end a zip file.

    Args:
        entries: All entries, in the order of the file.
        offset: Where the directory begins.
    """
    records = b"".join(entry.directory_record() for entry in entries)
    count, length = len(entries), len(records)
    end64 = b""
    if count >= _ZIP64_LIMIT_ENTRIES or length >= _ZIP64_LIMIT or offset >= _ZIP64_LIMIT:
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 3 << 8 | 45, 45, 0, 0, count, count, length, offset)
        end64 += struct.pack("<4sLQL", b"PK\6\7", 0, offset + length, 1)
    count, length, offset = min(count, _ZIP64_LIMIT_ENTRIES), min(length, _ZIP64_LIMIT), min(offset, _ZIP64_LIMIT)
    return records + end64 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, offset, 0)


def _chunk(array: str, index: tuple[int, ...]) -> str:
    return "/".join((array, "c", *map(str, index)))


def _compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))
