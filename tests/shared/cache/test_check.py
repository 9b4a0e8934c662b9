"""Every fault that can be made is found and named."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared.cache.check import check_files
from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.errors import InputError
from tests.shared.cache.conftest import ShardMaker


def big_shard(cache: Cache) -> Path:
    return next(cache.root.glob(f"shards/*/{'a' * 32}-*.tar"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def second_sample(cache: Cache) -> int:
    """Returns the offset of the second sample's first header."""
    return cache.read_index()["latent"][1].as_py()["offset"] - tarfile.BLOCKSIZE


def drop_a_row(cache: Cache) -> None:
    fragment = cache.root / "index" / f"{'a' * 32}.parquet"
    table = pq.read_table(fragment)
    pq.write_table(table.slice(1), fragment)


def add_a_row(cache: Cache) -> None:
    fragment = cache.root / "index" / f"{'b' * 32}.parquet"
    table = pq.read_table(fragment)
    row = table.to_pylist()[0] | {"sample": "f" * 32}
    pq.write_table(type(table).from_pylist([*table.to_pylist(), row], schema=table.schema), fragment)


def put_a_foreign_shard(cache: Cache) -> None:
    one, other = big_shard(cache), next(cache.root.glob(f"shards/*/{'b' * 32}-*.tar"))
    one.write_bytes(other.read_bytes())


FAULTS: dict[str, tuple[Callable[[Cache], None], str]] = {
    "a bit flipped in a latent": (lambda c: flip(big_shard(c), 600), "SHA-256"),
    "a bit flipped in padding": (lambda c: flip(big_shard(c), second_sample(c) - 1), "SHA-256"),
    "cut at a member": (lambda c: cut(big_shard(c), second_sample(c)), "bytes: expected"),
    "cut in a header": (lambda c: cut(big_shard(c), second_sample(c) + 100), "bytes: expected"),
    "cut in data": (lambda c: cut(big_shard(c), second_sample(c) + 530), "bytes: expected"),
    "a missing shard": (lambda c: big_shard(c).unlink(), "not readable: No such file"),
    "an empty shard": (lambda c: cut(big_shard(c), 0), "0 bytes: expected"),
    "a row too few": (drop_a_row, "6 of 6 members, and 3 that the index does not know"),
    "a row too many": (add_a_row, "3 of 6 members"),
    "a foreign shard": (put_a_foreign_shard, "0 of 9 members"),
    "a fragment that is garbage": (
        lambda c: (c.root / "index" / f"{'a' * 32}.parquet").write_bytes(b"PAR1 no"),  # type: ignore[dict-item]
        "not readable as a fragment",
    ),
}


def test_a_sound_cache_has_no_findings(cache: Cache) -> None:
    assert list(check_files(cache)) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(cache: Cache, name: str) -> None:
    damage, expected = FAULTS[name]
    damage(cache)
    faults = [f"{finding.path}: {finding.what}" for finding in check_files(cache) if finding.is_fault]
    assert any(expected in fault for fault in faults), faults


def test_leftovers_are_named_and_are_no_faults(cache: Cache, write_shard: ShardMaker) -> None:
    folder = big_shard(cache).parent
    (folder / ".tmp-123-abc").write_bytes(b"half a shard")
    (folder / f"{'e' * 32}-0123456789abcdef.tar").write_bytes(b"an orphan")
    write_shard(cache.root, [3], shard_id="f" * 32)
    findings = list(check_files(cache))
    assert len(findings) == 3
    assert not any(finding.is_fault for finding in findings)


def test_a_reader_names_shard_and_offset_of_a_corrupt_payload(cache: Cache) -> None:
    entry = cache.read_index()["latent"][0].as_py()
    flip(big_shard(cache), entry["offset"] + 1)
    with pytest.raises(InputError, match=rf"{'a' * 32}-.*, offset {entry['offset']}: found CRC32C .* corrupt"):
        StreamReader(cache.root).latent(entry)


def test_a_reader_names_a_shard_that_is_cut_short(cache: Cache) -> None:
    entry = cache.read_index()["latent"][1].as_py()
    cut(big_shard(cache), entry["offset"] + 10)
    with pytest.raises(InputError, match="found 10 bytes, expected .*cut short"):
        StreamReader(cache.root).latent(entry)
