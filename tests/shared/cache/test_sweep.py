"""Sweeping: what no reader needs goes, all else stays."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from shared.cache.compact import compact
from shared.cache.dataset import Cache
from shared.cache.repair_snapshot import mend_snapshot
from shared.cache.sweep import parse_age, sweep
from shared.errors import InputError
from shared.stores.local import LocalStore
from shared.stores.store import Entry
from tests.s3 import MotoS3, S3Server
from tests.shared.cache.conftest import ShardMaker
from tests.shared.cache.edited_cache import make_edited_cache, shard_names, state

GIGABYTE = 10**9
DAY = timedelta(hours=24)
NONE = timedelta(0)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


def age(cache: Cache, hours: float, prefix: str = "") -> None:
    """Makes files look as old as that."""
    then = time.time() - hours * 3600
    for entry in [*cache.store.list(prefix), *cache.store.leftovers()]:
        os.utime(cache.store.local_path(entry.path), (then, then))


def paths(cache: Cache) -> set[str]:
    return {entry.path for entry in [*cache.store.list(), *cache.store.leftovers()]}


@pytest.fixture
def edited(tmp_path: Path, write_shard: ShardMaker) -> Cache:
    return make_edited_cache(tmp_path / "cache", write_shard)


def orphan(cache: Cache, write_shard: ShardMaker) -> str:
    """Leaves what a job leaves that is killed between its shard and its fragment; returns the shard."""
    shard = write_shard(cache.url, [9], shard_id="9" * 32).shard
    cache.store.delete(f"index/{'9' * 32}.parquet")
    return shard


def test_a_cache_without_orphans_loses_nothing(edited: Cache) -> None:
    before = paths(edited)
    assert str(sweep(edited, NONE)) == "nothing to delete"
    assert paths(edited) == before


def test_an_orphan_and_a_leftover_go_once_they_are_old_enough(edited: Cache, write_shard: ShardMaker) -> None:
    before = paths(edited)
    shard = orphan(edited, write_shard)
    (Path(edited.url) / ".tmp-123-abc").write_bytes(b"half")
    assert str(sweep(edited, DAY)) == "nothing to delete"
    age(edited, 25)
    num_bytes = edited.store.size(shard)
    expected = f"1 shard ({num_bytes:,} bytes), 1 leftover (4 bytes)"
    assert str(sweep(edited, DAY, dry_run=True)) == f"would delete {expected}"
    assert paths(edited) == before | {shard, ".tmp-123-abc"}
    assert str(sweep(edited, DAY)) == f"deleted {expected}"
    assert paths(edited) == before


def test_what_a_reader_within_the_limit_may_read_stays_after_compaction(edited: Cache) -> None:
    age(edited, 1000)
    before, old = state(edited), paths(edited)
    compact(edited, GIGABYTE)
    sweep(edited, DAY)
    assert old <= paths(edited), "the snapshot is young: a reader may have opened the cache before it"
    age(edited, 25, "snapshots")
    age(edited, 25, "shards")
    swept = sweep(edited, DAY)
    assert swept.files["covered fragments"][0] == 9
    assert swept.files["shards"][0] == 7
    assert state(edited) == before


def test_earlier_snapshots_go_with_their_parts_when_a_later_one_is_old_enough(
    edited: Cache, write_shard: ShardMaker
) -> None:
    compact(edited, GIGABYTE)
    age(edited, 1000)
    write_shard(edited.url, [7], shard_id="7" * 32)
    compact(edited, GIGABYTE)
    before, first = state(edited), "snapshots/000001.parquet"
    sweep(edited, DAY)
    assert first in paths(edited)
    age(edited, 25)
    swept = sweep(edited, DAY)
    assert swept.files["old snapshots"][0] == 1
    assert swept.files["files of snapshots"][0] == 3
    assert first not in paths(edited)
    assert state(edited) == before


def test_a_sweep_that_is_killed_at_any_deletion_leaves_a_whole_cache(
    edited: Cache, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(edited, GIGABYTE)
    write_shard(edited.url, [7], shard_id="7" * 32)
    compact(edited, GIGABYTE)
    before, whole = state(edited), LocalStore.delete
    for survivors in range(40):
        done: list[str] = []

        def delete(store: LocalStore, path: str, survivors: int = survivors, done: list[str] = done) -> None:
            if len(done) == survivors % 4:
                raise KeyboardInterrupt
            done.append(path)
            whole(store, path)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "delete", delete)
            try:
                swept = sweep(Cache.open(edited.url), NONE)
            except KeyboardInterrupt:
                swept = None
        assert state(Cache.open(edited.url)) == before
        if swept is not None:
            break
    sweep(edited, NONE)
    assert state(Cache.open(edited.url)) == before
    assert len(shard_names(edited)) == 2


def test_a_shard_that_a_job_writes_once_more_meanwhile_stays(
    edited: Cache, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = orphan(edited, write_shard)
    age(edited, 25)
    listing, waiting = LocalStore.list, ["shards/2x16x24"]

    def list_later(store: LocalStore, prefix: str = "") -> Iterator[Entry]:
        if prefix in waiting:
            waiting.clear()
            assert write_shard(edited.url, [9], shard_id="9" * 32).shard == shard
        return listing(store, prefix)

    monkeypatch.setattr(LocalStore, "list", list_later)
    assert sweep(edited, DAY).files["shards"] == (0, 0)
    assert not waiting
    assert f"{9:032x}" in state(edited)[0]


def test_a_shard_that_a_job_writes_once_more_while_many_are_deleted_stays(
    edited: Cache, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = orphan(edited, write_shard)
    others = [f"shards/2x16x24/{number:032x}-{'0' * 16}.tar" for number in range(300)]
    for path in others:
        edited.store.write(path, b"killed")
    age(edited, 25)
    deletion, waiting = LocalStore.delete, [True]

    def delete(store: LocalStore, path: str) -> None:
        if path == others[0]:
            waiting.clear()
            assert write_shard(edited.url, [9], shard_id="9" * 32).shard == shard
        deletion(store, path)

    monkeypatch.setattr(LocalStore, "delete", delete)
    assert sweep(edited, DAY).files["shards"] == (300, 6 * 300)
    assert not waiting
    assert f"{9:032x}" in state(edited)[0]


def test_fragments_that_a_repair_made_count_again_stay(edited: Cache) -> None:
    before = state(edited)
    compact(edited, GIGABYTE)
    age(edited, 25)
    files = edited.index_files()
    lost = [path for path in files.parts if "/rows-" in path]
    assert mend_snapshot(edited.store, files, broken_parts=lost, broken_shards=())
    counting = set(edited.index_files().fragments)
    assert len(counting) == 9
    assert sweep(edited, DAY).files["covered fragments"][0] == 0
    assert set(edited.index_files().fragments) == counting
    assert state(edited) == before


def test_shards_of_shared_texts_that_rows_of_a_fragment_name_stay(edited: Cache) -> None:
    edited.store.delete(f"index/{'c' * 32}.parquet")  # As if its fragment were lost: the rows of others still name it.
    sweep(edited, NONE)
    assert any("c" * 32 in name for name in shard_names(edited))


def test_nothing_is_deleted_where_the_snapshot_misses_something(edited: Cache) -> None:
    compact(edited, GIGABYTE)
    lost = edited.read_index().to_pylist()[0]["latent"]["shard"]
    edited.store.delete(lost)
    before = paths(edited)
    with pytest.raises(InputError, match=f"{lost}: missing .*nothing was deleted: run preprocess.verify"):
        sweep(edited, NONE)
    assert paths(edited) == before


def test_foreign_files_stay(edited: Cache) -> None:
    for path in ("notes.txt", "shards/2x16x24/readme.txt", "streams/other.txt"):
        edited.store.write(path, b"mine")
    before = paths(edited)
    sweep(edited, NONE)
    assert paths(edited) == before


def test_a_cache_in_a_bucket_is_compacted_and_swept(
    write_shard: ShardMaker, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    cache = make_edited_cache(f"{s3.url}/cache", write_shard)
    before = state(cache)
    compact(cache, GIGABYTE)
    time.sleep(1.1)  # The server's times have whole seconds.
    swept = sweep(cache, NONE)
    assert swept.files["covered fragments"][0] == 9
    assert len(shard_names(cache)) == 2
    assert state(Cache.open(cache.url)) == before


def test_ages_are_read_with_their_units() -> None:
    assert parse_age("90m") == timedelta(minutes=90)
    assert parse_age("7d") == timedelta(days=7)
    for text in ("24", "h", "-1h", "1w"):
        with pytest.raises(InputError, match="expected a number and m, h or d"):
            parse_age(text)
