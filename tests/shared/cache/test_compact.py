"""Merging small shards, and the index into a snapshot."""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.cache import compact as compaction
from shared.cache.committed import read_committed
from shared.cache.compact import Compaction, compact, parse_bytes
from shared.cache.convert import convert
from shared.cache.dataset import Cache
from shared.cache.fragments import fragment_path, read_parts
from shared.cache.merges import SAMPLE_OVERHEAD, ShardUse, plan_merges
from shared.cache.removal import remove_samples
from shared.cache.snapshot import ShardRecord, read_shards
from shared.cache.sweep import sweep
from shared.errors import InputError
from tests.shared.cache.conftest import PROVENANCE, ShardMaker, make_sample
from tests.shared.cache.edited_cache import STREAMS, make_edited_cache, shard_names, state, write_texts

GIGABYTE = 10**9


def use(name: str, num_bytes: int, *, total: int | None = None, environment: str = "{}") -> ShardUse:
    return ShardUse(
        record=ShardRecord(
            shard=f"shards/{name}",
            num_bytes=total or num_bytes,
            sha256="",
            kind="samples",
            clips_root="",
            environment=environment,
        ),
        num_samples=1,
        num_bytes=num_bytes - SAMPLE_OVERHEAD,
    )


def names(merges: list[Any]) -> list[list[str]]:
    return [[source.record.shard.removeprefix("shards/") for source in merge.sources] for merge in merges]


def test_small_shards_are_merged_up_to_the_limit_and_large_ones_stay() -> None:
    uses = [
        use(f"x/{number}.tar", size)
        for number, size in enumerate((200_000, 250_000, 250_001, 240_000, 230_000, 240_000))
    ]
    assert names(plan_merges(uses, 1_000_000)) == [["x/0.tar", "x/1.tar", "x/3.tar", "x/4.tar"]]
    assert names(plan_merges([*uses, use("x/9.tar", 5000)], 1_000_000))[1:] == [["x/5.tar", "x/9.tar"]]


def test_a_plan_looks_at_each_shard_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, whole = 0, ShardUse.__dict__["merged_bytes"].fget

    def merged_bytes(shard_use: ShardUse) -> int:
        nonlocal looks
        looks += 1
        return int(whole(shard_use))

    monkeypatch.setattr(ShardUse, "merged_bytes", property(merged_bytes))
    merges = plan_merges([use(f"x/{number:03}.tar", 5000) for number in range(500)], 1_000_000)
    assert [len(merge.sources) for merge in merges] == [200, 200, 100]
    assert looks <= 5 * 500


def test_only_shards_of_one_bucket_container_and_environment_are_merged() -> None:
    uses = [
        use("x/0.tar", 5000),
        use("x/1.zarr.zip", 5000),
        use("y/2.tar", 5000),
        use("x/3.tar", 5000, environment='{"device": "other"}'),
        use("x/4.tar", 5000),
    ]
    assert names(plan_merges(uses, GIGABYTE)) == [["x/0.tar", "x/4.tar"]]


def test_a_small_shard_alone_is_rewritten_only_if_most_of_it_is_dead() -> None:
    assert names(plan_merges([use("x/0.tar", 5000, total=9999)], GIGABYTE)) == []
    assert names(plan_merges([use("x/0.tar", 5000, total=10_001)], GIGABYTE)) == [["x/0.tar"]]


@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_compaction_and_sweeping_change_nothing_that_is_read(
    tmp_path: Path, write_shard: ShardMaker, container: str
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard, container=container)
    before = state(cache)
    done = compact(cache, GIGABYTE)
    assert done.num_samples == 6
    assert done.num_fragments == 9
    assert state(cache) == before
    sweep(cache, timedelta(0))
    assert state(cache) == before
    # One of samples, and the one that samples share.
    assert sorted(name.split("/")[1] for name in shard_names(cache)) == ["2x16x24", "text.t5"]
    assert not list(cache.store.list("index"))


def test_the_snapshot_names_every_shard_with_its_size_hash_and_record(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    compact(cache, GIGABYTE)
    sweep(cache, timedelta(0))
    shards = read_shards(cache.store, cache.index_files().snapshot)
    assert {shard.shard: shard.num_bytes for shard in shards} == {
        entry.path: entry.num_bytes for entry in cache.store.list("shards")
    }
    assert {(shard.kind, shard.clips_root, shard.environment, shard.num_samples) for shard in shards} == {
        ("samples", "clips", '{"device": "cpu"}', 6),
        ("texts", "clips", '{"device": "cpu"}', None),
    }


def test_rows_of_one_shard_stand_together_in_the_order_of_the_shard(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    write_shard(tmp_path / "cache", [20, 21], shard_id="8" * 32, container="zarr")
    compact(cache, GIGABYTE)
    places = [(row["latent"]["shard"], row["latent"]["offset"]) for row in cache.read_index().to_pylist()]
    shards = [shard for shard, _ in groupby(places, key=itemgetter(0))]
    assert len(shards) == len(set(shards)) == 2
    assert sorted(places, key=lambda place: (shards.index(place[0]), place[1])) == places


def test_a_merged_tar_has_each_sample_with_its_newest_text(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    compact(cache, GIGABYTE)
    row = next(row for row in cache.read_index().to_pylist() if row["sample"] == f"{1:032x}")
    with tarfile.open(cache.store.local_path(row["latent"]["shard"])) as tar:
        members = [name.partition(".")[2] for name in tar.getnames() if name.startswith(row["sample"])]
        assert members == ["latent", "text.b", "text.t5", "json"] or members == ["latent", "text.t5", "text.b", "json"]
        assert b"New caption of 1" in tar.extractfile(f"{row['sample']}.json").read()


def test_texts_that_lie_over_large_shards_are_merged_in_their_own_folder(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    write_texts(tmp_path / "cache", [0, 3], stream="text.t5", shard_id="9" * 32, generation=1)
    before = state(cache)
    samples_stay = compaction._sample_merges
    monkeypatch.setattr(compaction, "_sample_merges", lambda *_: [])
    assert compact(cache, GIGABYTE).num_merged == 2
    assert state(cache) == before
    sweep(cache, timedelta(0))
    assert state(cache) == before
    folders = sorted(name.split("/")[1] for name in shard_names(cache))
    assert folders == [*["2x16x24"] * 4, "text.b", "text.t5", "text.t5"]
    monkeypatch.setattr(compaction, "_sample_merges", samples_stay)
    compact(cache, GIGABYTE)
    assert state(cache) == before


def test_samples_are_looked_through_once_a_stream_however_many_merges_it_has(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    write_shard(cache.url, list(range(10)))
    for number in range(10):
        write_texts(cache.url, [number], stream="text.t5", shard_id=f"{number:032x}", generation=1)
    before, looks, staying = state(cache), 0, compaction._staying_texts

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return staying(*arguments)

    monkeypatch.setattr(compaction, "_staying_texts", counted)
    monkeypatch.setattr(compaction, "_sample_merges", lambda *_: [])
    done = compact(cache, 4 * (SAMPLE_OVERHEAD + 64))
    assert (done.num_merged, done.num_shards) == (10, 3)
    assert looks == 2
    assert state(cache) == before


def _captions(texts: pa.Array) -> pa.Array:
    """Returns a stream's column in which each sample has one caption."""
    captions = pa.StructArray.from_arrays([texts], ["caption"])
    lists = pa.ListArray.from_arrays(pa.array(range(len(captions) + 1), pa.int32()), captions)
    return pa.StructArray.from_arrays([lists], ["captions"])


def test_moved_captions_may_be_more_than_one_array_can_hold() -> None:
    size = 900 * 2**20
    zeros = pa.py_buffer(np.zeros(size + 8, np.uint8))  # Never read, and so never in memory.
    structs = []
    for merge in range(3):
        offsets = pa.py_buffer(np.array([0, size, size + merge + 1], np.int32))
        structs.append(_captions(pa.StringArray.from_buffers(2, offsets, zeros)))
    moved = compaction._Moved(positions=[np.array([4, 5]), np.array([0, 3]), np.array([1, 2])], structs=structs)
    overlays = {"text.t5": compaction._Overlay(moved)}
    positions = np.array([2, 3, 5, 9])
    table = pa.table({"text.t5": _captions(pa.array(["old"] * 4))})
    column = compaction._overlaid(table, positions, overlays)["text.t5"]
    lengths = [len(row["captions"][0]["caption"]) for row in column.to_pylist()]
    assert lengths == [3, 2, 1, len("old")]


def test_a_stream_that_the_opened_cache_does_not_know_is_not_left_out(cache: Cache) -> None:
    opened_before = Cache.open(cache.url)
    Cache.open_or_create(cache.url, STREAMS)
    write_texts(cache.url, [0, 1], stream="text.b", shard_id="1" * 32, generation=0)
    with pytest.raises(InputError, match=r"has texts of the stream text\.b, which was added meanwhile: run again"):
        compact(opened_before, GIGABYTE)
    description = Path(cache.url) / "streams" / "text.b.json"
    content = description.read_bytes()
    description.unlink()
    with pytest.raises(InputError, match=r"dataset\.json does not describe: bring back streams/text\.b\.json"):
        compact(Cache.open(cache.url), GIGABYTE)
    description.write_bytes(content)
    before = state(Cache.open(cache.url))
    compact(Cache.open(cache.url), GIGABYTE)
    assert state(Cache.open(cache.url)) == before


def test_compacting_again_merges_what_came_since_and_then_finds_nothing_to_do(
    tmp_path: Path, write_shard: ShardMaker
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    assert compact(cache, GIGABYTE).snapshot == "snapshots/000001.parquet"
    assert compact(cache, GIGABYTE).snapshot is None
    write_shard(tmp_path / "cache", [7, 8], shard_id="7" * 32)
    remove_samples(cache, [f"{3:032x}"])
    before = state(cache)
    assert compact(cache, GIGABYTE).snapshot == "snapshots/000002.parquet"
    assert state(cache) == before
    sweep(cache, timedelta(0))
    assert state(cache) == before
    assert len(shard_names(cache)) == 2


def _at_commit(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Runs ``action`` once, directly before the first snapshot is created."""
    create, waiting = compaction.commit_snapshot, [action]

    def create_later(*args: Any, **kwargs: Any) -> bool:
        if waiting:
            waiting.pop()()
        return create(*args, **kwargs)

    monkeypatch.setattr(compaction, "commit_snapshot", create_later)


def test_of_two_compactions_at_once_one_wins_and_the_other_says_so(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    before, winners = state(cache), list[Compaction]()
    _at_commit(monkeypatch, lambda: winners.append(compact(Cache.open(cache.url), GIGABYTE)))
    with pytest.raises(InputError, match="another compaction finished first and made snapshot 1"):
        compact(cache, GIGABYTE)
    assert winners[0].snapshot == cache.index_files().snapshot
    assert state(cache) == before
    assert not [name for name in shard_names(cache) if name not in _named(cache)]
    assert len(list(cache.store.list("snapshots"))) == 1 + len(read_parts(cache.store, winners[0].snapshot))


def _named(cache: Cache) -> set[str]:
    """Returns the shards that the snapshot or any fragment names."""
    files = cache.index_files()
    fragments = [f"{path.removeprefix('index/').removesuffix('.parquet')}-" for path in files.covered]
    merged = {shard.shard for shard in read_shards(cache.store, files.snapshot)}
    return merged | {name for name in shard_names(cache) if any(part in name for part in fragments)}


def test_what_a_job_commits_during_compaction_is_not_lost(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    _at_commit(monkeypatch, lambda: write_shard(tmp_path / "cache", [7], shard_id="7" * 32))
    compact(cache, GIGABYTE)
    assert f"{7:032x}" in cache.read_index()["sample"].to_pylist()
    before = state(cache)
    sweep(cache, timedelta(0))
    assert state(cache) == before
    assert len(before[0]) == 7


def test_a_reader_that_opened_before_reads_on_after_compaction(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    rows = cache.read_index().to_pylist()
    compact(cache, GIGABYTE)
    sweep(cache, timedelta(hours=24))
    assert all((tmp_path / "cache" / row["latent"]["shard"]).is_file() for row in rows)


def test_a_worker_that_wakes_after_its_shard_was_compacted_and_swept_changes_nothing(
    tmp_path: Path, write_shard: ShardMaker
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    before = state(cache)
    compact(cache, GIGABYTE)
    sweep(cache, timedelta(0))
    late = write_shard(tmp_path / "cache", [0, 1, 2], shard_id="a" * 32)
    assert late.created, "nothing tells the worker"
    assert cache.store.size(fragment_path("a" * 32)) is not None
    assert state(cache) == before
    assert cache.index_files().fragments == ()
    compact(cache, GIGABYTE)
    sweep(cache, timedelta(0))
    assert late.shard not in shard_names(cache)
    assert state(cache) == before


def test_a_sample_removed_before_compaction_is_encoded_again_at_a_higher_generation(
    tmp_path: Path, write_shard: ShardMaker
) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    compact(cache, GIGABYTE)
    assert read_committed(cache, "text.t5").removed.by_sample()[f"{2:032x}"] == 0
    write_shard(tmp_path / "cache", [2], shard_id="7" * 32, generation=0)
    assert len(cache.read_index()) == 6
    write_shard(tmp_path / "cache", [2], shard_id="8" * 32, generation=1)
    assert len(cache.read_index()) == 7


def test_a_corrupt_payload_stops_compaction(tmp_path: Path, cache: Cache) -> None:
    place = cache.read_index().to_pylist()[0]["latent"]
    path = cache.store.local_path(place["shard"])
    data = bytearray(path.read_bytes())
    data[place["offset"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="found CRC32C"):
        compact(cache, GIGABYTE)
    assert cache.index_files().snapshot is None


def test_samples_without_the_manifests_columns_and_with_others_are_compacted_together(
    tmp_path: Path, cache: Cache, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, columns in ((30, {}), (31, {"sharpness": 1.0, "camera": None})):
        changed = replace(make_sample(number), manifest=columns)
        monkeypatch.setitem(write_shard.__globals__, "make_sample", lambda _, changed=changed: changed)
        write_shard(cache.url, [number], shard_id=f"{number:032x}")
    before = cache.read_index()["manifest"].to_pylist()
    compact(cache, GIGABYTE)
    after = cache.read_index()["manifest"].to_pylist()
    assert len(after) == 6
    assert all(row in after for row in before)


def test_a_compacted_cache_is_converted(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    before = state(cache)
    compact(cache, GIGABYTE)
    convert(cache, str(tmp_path / "target"), "zarr")
    assert state(Cache.open(tmp_path / "target")) == before


def test_sizes_are_read_with_their_units() -> None:
    assert parse_bytes("1GB") == 10**9
    assert parse_bytes("256MB") == 256 * 10**6
    for text in ("", "1", "2GB", "0MB", "1.5GB", "GB"):
        with pytest.raises(InputError, match="expected 1MB to 1GB"):
            parse_bytes(text)
