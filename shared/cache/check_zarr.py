"""A Zarr shard as any Zarr reader sees it, against the index. Pure over bytes; nothing is ever unpickled."""

import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from shared.cache.check_tar import Entries, name_faults
from shared.cache.expectation import ExpectedShard
from shared.cache.layout import is_text
from shared.cache.zarr_layout import CHECKSUM_BYTES, FORMAT, KEY_DIGITS, ArrayKind, ShardOutline
from shared.cache.zarr_zip import read_directory
from shared.codec import Codec
from shared.errors import InputError

_DOCUMENT = "zarr.json"
_DTYPES = {"float32", "float16", "uint16", "uint8", "int8"}
_CODECS = {"bytes", "zstd", "crc32c"}


def zarr_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    """Yields where a Zarr shard's entries, its metadata or its arrays differ from the index.

    Raises:
        InputError: if it is not a zip file as our writer makes them.
    """
    entries = read_directory(io.BytesIO(data))
    end = max((offset + num_bytes for offset, num_bytes in entries.values()), default=0)
    if data[end : end + 4] != b"PK\1\2":
        yield f"the zip's directory does not follow its last entry, which ends at {end}"
    try:
        documents = _documents(entries, data)
        outline, wanted = _outline(expected)
        places = wanted.values()
        if expected.is_whole:
            names = wanted.keys() | {name for name, _ in outline.documents()}
            yield from name_faults(expected, entries, names, "entries")
            yield from _document_faults(outline, documents)
            for name, place in wanted.items():
                if name in entries and entries[name] != place:
                    yield f"{name} lies at {entries[name]}: the index says {place}"
        elif missing := set(places) - set(entries.values()):
            yield f"{len(missing)} payloads of the index are no entries of it, e.g. that at offset {min(missing)[0]}"
        yield from _array_faults(documents)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"its metadata is not readable as Zarr ({type(error).__name__}: {error})"
    yield from _checksum_faults(expected, data)


def _checksum_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    for member in expected.members:
        for stored in member.payloads:
            end = stored.offset + stored.num_bytes
            if stored.crc32c is not None and data[end : end + CHECKSUM_BYTES] != struct.pack("<L", stored.crc32c):
                yield f"{member.stream} of sample {member.key}: the checksum behind it is not the index's"


def _outline(expected: ExpectedShard) -> tuple[ShardOutline, Entries]:
    """Returns what our writer makes of the index's rows: the outline, and where each payload's entry lies.

    Raises:
        InputError: if no shard can hold such rows.
    """
    outline, wanted = ShardOutline(), Entries()
    kinds: dict[str, dict[str, list[ArrayKind]]] = {key: {} for key in expected.keys}
    members = {(member.key, member.stream): member for member in expected.members}
    first: dict[str, ArrayKind] = {}
    for member in expected.members:
        found = [(Codec.parse(stored.codec), stored.shape) for stored in member.payloads]
        if len(member.key) != KEY_DIGITS or any(min(shape) < 1 for _, shape in found):
            raise InputError(f"{member.stream} of sample {member.key}: no Zarr shard holds such a row")
        if not is_text(member.stream) and found != [first.setdefault(member.stream, found[0])]:
            raise InputError(
                f"{member.stream} of sample {member.key}: of another shape or codec than the shard's first"
            )
        kinds.setdefault(member.key, {})[member.stream] = found
    for key, streams in kinds.items():
        for stream, names in outline.add(key, streams, "{}").items():
            for name, stored in zip(names, members[key, stream].payloads, strict=True):
                wanted[name] = (stored.offset, stored.num_bytes + CHECKSUM_BYTES)
    return outline, wanted


def _documents(entries: Entries, data: bytes) -> dict[str, Any]:
    """Returns the metadata by name.

    Raises:
        InputError: if an array is of another type, or of other codecs, than ours; such are not opened.
    """
    documents = {}
    for name, (offset, num_bytes) in entries.items():
        if name.split("/")[-1] != _DOCUMENT:
            continue
        document = json.loads(data[offset : offset + num_bytes])
        consolidated = document.get("consolidated_metadata", {}).get("metadata", {})
        for part in (document, *consolidated.values()):
            if part["node_type"] == "group":
                continue
            codecs = {codec["name"] for codec in part["codecs"]}
            if part["data_type"] not in _DTYPES or not codecs <= _CODECS:
                raise InputError(
                    f"{name}: an array of type {part['data_type']!r} with codecs {sorted(codecs)}: expected one of "
                    f"{sorted(_DTYPES)} with {sorted(_CODECS)}; it is not opened"
                )
        documents[name] = document
    return documents


def _document_faults(outline: ShardOutline, documents: dict[str, Any]) -> Iterator[str]:
    for name, content in outline.documents():
        found, wanted = documents.get(name), json.loads(content)
        if found is None:
            continue
        if name == _DOCUMENT:
            attributes = found["attributes"]
            samples = [{**sample, "description": {}} for sample in attributes["samples"]]
            if attributes["format"] != FORMAT or samples != wanted["attributes"]["samples"]:
                yield "the root's attributes name other samples than the index"
            found, wanted = found["consolidated_metadata"], wanted["consolidated_metadata"]
        if found != wanted:
            yield f"{name} describes another array than the index"


def _array_faults(documents: dict[str, Any]) -> Iterator[str]:
    """Opens the group by zarr-python, by the consolidated metadata and by each array's own."""
    buffers = default_buffer_prototype().buffer
    store = MemoryStore({name: buffers.from_bytes(json.dumps(value).encode()) for name, value in documents.items()})
    alone = {name.removesuffix(f"/{_DOCUMENT}"): value for name, value in documents.items() if name != _DOCUMENT}
    wanted = {name: tuple(value["shape"]) for name, value in alone.items() if value["node_type"] == "array"}
    group = zarr.open_group(store, mode="r", use_consolidated=True)
    found = {name: array.shape for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
    if found != wanted:
        yield f"zarr-python finds {len(found)} arrays in it, of other names or shapes than its {len(wanted)} own"
