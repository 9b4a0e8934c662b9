"""A tar shard as any tar reader sees it, against the index. Pure over bytes."""

import io
import json
import tarfile
from collections.abc import Iterator

from shared.cache.expectation import ExpectedShard
from shared.errors import InputError

Entries = dict[str, tuple[int, int]]
"""Where the data of each named entry lies: offset and bytes."""


def tar_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    """Yields where a tar's members differ from the index.

    Raises:
        InputError: if it is no tar, or has a member that is no plain file under a plain name of its own.
    """
    entries = _entries(data)
    wanted: Entries = {}
    for member in expected.members:
        offset = member.payloads[0].offset
        wanted[f"{member.key}.{member.stream}"] = (offset, sum(stored.num_bytes for stored in member.payloads))
        for stored in member.payloads:
            if stored.offset != offset:
                yield f"captions of sample {member.key} do not stand one behind another: {stored.offset}, not {offset}"
            offset += stored.num_bytes
    documents = {f"{key}.json" for key in expected.keys}
    yield from name_faults(expected, entries, wanted.keys() | documents, "members")
    for name, place in wanted.items():
        if name in entries and entries[name] != place:
            yield f"{name} lies at {entries[name][0]}, {entries[name][1]} bytes: the index says {place[0]}, {place[1]}"
    for name in sorted(documents & entries.keys()):
        offset, num_bytes = entries[name]
        try:
            if not isinstance(json.loads(data[offset : offset + num_bytes]), dict):
                yield f"{name} is not a JSON object"
        except ValueError as error:
            yield f"{name} is not readable as JSON: {error}"


def name_faults(expected: ExpectedShard, entries: Entries, wanted: set[str], what: str) -> Iterator[str]:
    """Yields one line if a shard has other entries than the index wants."""
    missing, unknown = sorted(wanted - entries.keys()), sorted(entries.keys() - wanted)
    if not expected.is_whole:
        unknown = []
    if missing or unknown:
        example = f"missing {missing[0]}" if missing else f"unknown {unknown[0]}"
        yield (
            f"{len(wanted) - len(missing)} of {len(wanted)} {what}, and {len(unknown)} that the index does not know "
            f"(e.g. {example})"
        )


def _entries(data: bytes) -> Entries:
    entries: Entries = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    raise InputError(f"member {member.name!r} is a link, a device or a folder: expected plain files")
                if not _is_plain(member.name):
                    raise InputError(f"member {member.name!r} leads out of the shard's folder")
                if member.name in entries:
                    raise InputError(f"member {member.name!r} stands in it twice")
                entries[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise InputError(f"not readable as tar: {error}") from None
    if not data.endswith(bytes(2 * tarfile.BLOCKSIZE)):
        raise InputError("not readable as tar: found no two zero blocks at its end")
    return entries


def _is_plain(name: str) -> bool:
    return name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
