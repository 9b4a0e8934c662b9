"""Checking one shard against the index, byte for byte. Pure over bytes."""

import hashlib
import re
from collections.abc import Iterator

import google_crc32c

from shared.cache import payload
from shared.cache.check_tar import tar_faults
from shared.cache.check_zarr import zarr_faults
from shared.cache.expectation import ExpectedShard, Payload
from shared.cache.finding import Finding
from shared.cache.layout import container_of
from shared.codec import Codec
from shared.errors import InputError
from shared.wording import counted

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{16})\.(tar|zarr\.zip)$")
_MOST_NAMED = 5


def check_shard(expected: ExpectedShard, data: bytes) -> Iterator[Finding]:
    """Yields what is wrong with a shard.

    A shard whose bytes are the ones that were committed and that does not fit its fragment speaks against the
    fragment: then the fragment is named.

    Args:
        expected: What the index says of it.
        data: The whole shard.
    """
    broken = list(_identity_faults(expected, data))
    yield from (Finding(path=expected.shard, what=what, remedy="encode again") for what in broken)
    details = [*_shortened(_payload_faults(expected, data)), *_shortened(_container_faults(expected, data))]
    blames_index = not broken and expected.is_whole
    for what in details:
        if blames_index:
            what = f"does not fit its shard {expected.shard}, whose SHA-256 is the recorded one: {what}"
            yield Finding(path=expected.index_path, what=what, remedy="set aside")
        else:
            yield Finding(path=expected.shard, what=what, remedy="encode again")


def _shortened(faults: Iterator[str]) -> list[str]:
    lines = list(faults)
    if len(lines) <= _MOST_NAMED:
        return lines
    return [*lines[:_MOST_NAMED], f"and {counted(len(lines) - _MOST_NAMED, 'more fault')}"]


def _identity_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    if expected.num_bytes is not None and len(data) != expected.num_bytes:
        yield f"{len(data)} bytes: expected {expected.num_bytes}"
    found = hashlib.sha256(data).hexdigest()
    named = _HASH_IN_NAME.search(expected.shard)
    for digest in (expected.sha256, named[1] if named else None):
        if digest is not None and not found.startswith(digest):
            yield f"SHA-256 {found[:16]}...: expected {digest[:16]}..."
            return


def _payload_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    view = memoryview(data)
    for member in expected.members:
        for number, stored in enumerate(member.payloads):
            if what := _payload_fault(stored, view):
                caption = f" {number}" if len(member.payloads) > 1 else ""
                yield f"{member.stream}{caption} of sample {member.key} at offset {stored.offset}: {what}"
    own = {stored for member in expected.members for stored in member.payloads}
    for stored in sorted(expected.referred - own, key=lambda stored: stored.offset):
        if what := _payload_fault(stored, view):
            yield f"a text that other shards' samples share, at offset {stored.offset}: {what}"


def _payload_fault(stored: Payload, data: memoryview) -> str | None:
    found = data[stored.offset : stored.offset + stored.num_bytes] if min(stored.offset, stored.num_bytes) >= 0 else b""
    if len(found) != stored.num_bytes:
        return f"found {len(found)} bytes, expected {stored.num_bytes}"
    if stored.crc32c is not None and (crc32c := google_crc32c.value(bytes(found))) != stored.crc32c:
        return f"found CRC32C {crc32c:08x}, expected {stored.crc32c:08x}: checksum differs"
    try:
        payload.decode(found, Codec.parse(stored.codec), stored.shape)
    except InputError as error:
        return f"not decodable: {error}"
    return None


def _container_faults(expected: ExpectedShard, data: bytes) -> Iterator[str]:
    faults = tar_faults if container_of(expected.shard) == "tar" else zarr_faults
    try:
        yield from faults(expected, data)
    except InputError as error:
        yield str(error)
