"""Damaging caches on purpose, byte by byte and by hostile writers."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from shared.cache import layout
from shared.cache.dataset import Cache
from shared.cache.fragments import fragment_bytes, fragment_path, read_fragment, read_record
from shared.cache.schema import rows_table


def path_of(cache: Cache, place: str) -> Path:
    """Returns the file of an object."""
    path = cache.store.local_path(place)
    assert path is not None
    return path


def shard_of(cache: Cache, letter: str = "a") -> Path:
    """Returns the file of the shard whose identity is this letter alone."""
    return path_of(cache, read_record(cache.store, letter * 32)["shard"])


def fragment_of(cache: Cache, letter: str = "a") -> Path:
    return path_of(cache, fragment_path(letter * 32))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def latent_offset(cache: Cache, letter: str = "a", row: int = 0) -> int:
    table = read_fragment(cache.store, fragment_path(letter * 32))
    return int(table["latent"][row].as_py()["offset"])


def rewrite_rows(cache: Cache, letter: str, change: Callable[[list[dict]], list[dict]]) -> None:
    """Writes a fragment anew with other rows."""
    rows = change(read_fragment(cache.store, fragment_path(letter * 32)).to_pylist())
    record = read_record(cache.store, letter * 32)
    fragment_of(cache, letter).write_bytes(fragment_bytes(rows_table(rows), record))


def recommit(cache: Cache, letter: str, data: bytes) -> None:
    """Puts other bytes into a shard and makes name, size and hash fit them, as a hostile writer would."""
    record = read_record(cache.store, letter * 32)
    old = record["shard"]
    digest = hashlib.sha256(data).hexdigest()
    new = layout.shard_object(old.split("/")[1], letter * 32, digest, layout.container_of(old))
    path_of(cache, old).unlink()
    path_of(cache, new).write_bytes(data)
    table = read_fragment(cache.store, fragment_path(letter * 32)).replace_schema_metadata(None)
    rows = json.loads(json.dumps(table.to_pylist()).replace(old, new))
    record |= {"shard": new, "shard_bytes": len(data), "shard_sha256": digest}
    fragment_of(cache, letter).write_bytes(fragment_bytes(rows_table(rows), record))


def add_to_tar(cache: Cache, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    """Appends a member behind the last one of shard a, where it moves nothing."""
    data = shard_of(cache).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    header = tarfile.TarInfo(name)
    header.type = kind
    header.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    recommit(cache, "a", data[:end] + header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


def edit_zip(cache: Cache, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Rewrites shard a with other entries."""
    with zipfile.ZipFile(shard_of(cache)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    recommit(cache, "a", buffer.getvalue())


def edit_document(cache: Cache, name: str, change: Callable[[dict], None]) -> None:
    """Rewrites one JSON document of the Zarr shard a."""

    def edit(entries: list[tuple[str, bytes]]) -> None:
        position = [entry for entry, _ in entries].index(name)
        document = json.loads(entries[position][1])
        change(document)
        entries[position] = (name, json.dumps(document).encode())

    edit_zip(cache, edit)
