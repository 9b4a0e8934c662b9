"""A repair drops what is broken and nothing else."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from shared.cache.check import check_files
from shared.cache.check_description import open_for_check
from shared.cache.commit import ShardWriter, commit_rows
from shared.cache.committed import read_committed
from shared.cache.compact import compact
from shared.cache.dataset import Cache
from shared.cache.identity import text_id
from shared.cache.layout import Container
from shared.cache.null_caption import read_null_caption, write_null_caption
from shared.cache.reader import StreamReader
from shared.cache.removal import remove_samples
from shared.cache.repair import repair
from shared.cache.rows import Text, shared_text_row, text_row
from shared.cache.schema import rows_table
from shared.cache.sweep import sweep
from shared.codec import Codec
from shared.errors import InputError
from tests.shared.cache.conftest import PROVENANCE, ShardMaker, make_sample
from tests.shared.cache.damage import (
    cut,
    flip,
    fragment_of,
    path_of,
    rewrite_rows,
    shard_of,
)

BFLOAT16 = Codec(values="bfloat16")
SHARED_TEXTS = ("one", "two")


def mended(cache: Cache) -> tuple[Cache, list[str]]:
    """Returns the cache after a repair, which must leave no fault, and what the repair said."""
    opened, faults = open_for_check(cache.url)
    faults += [finding for finding in check_files(opened) if finding.is_fault]
    assert faults
    done = list(repair(opened, faults))
    again, faults = open_for_check(cache.url)
    assert [*faults, *(finding for finding in check_files(again) if finding.is_fault)] == []
    assert list(repair(again, [])) == []
    return again, done


def samples(cache: Cache) -> list[int]:
    return sorted(int(sample, 16) for sample in cache.read_index()["sample"].to_pylist())


def add_shared_texts(cache: Cache, container: Container = "tar") -> None:
    """Puts two texts into shard d, and gives samples 0 and 3 texts of it."""
    record = {"kind": "texts", "clips_root": "clips", "environment": {}}
    with ShardWriter(cache.store, shard_id="d" * 32, folder="text.t5", container=container, record=record) as writer:
        for number, caption in enumerate(SHARED_TEXTS):
            text = Text(id=text_id(caption), caption=caption, embedding=torch.full((4, 8), number + 1.0))
            writer.add(*shared_text_row("text.t5", text, BFLOAT16))
        writer.commit()
    places = cache.shared_texts("text.t5")
    texts = [Text(id=text_id(caption), caption=caption, embedding=places[text_id(caption)]) for caption in SHARED_TEXTS]
    rows = [text_row(make_sample(number).sample, "text.t5", texts, BFLOAT16, 1)[0] for number in (0, 3)]
    commit_rows(cache.store, "e" * 32, rows_table(rows), {"kind": "samples"})


def encode_again(cache: Cache, write_shard: ShardMaker, numbers: list[int], **options: object) -> None:
    """Does what the next job does with what is missing."""
    removed = read_committed(cache, "text.t5").removed.by_sample()
    for number in numbers:
        generation = removed.get(make_sample(number).sample, -1) + 1
        write_shard(cache.url, [number], shard_id=f"{number + 1}{generation}" * 16, generation=generation, **options)


def test_nothing_is_done_to_a_sound_cache(cache: Cache) -> None:
    before = {path: path.read_bytes() for path in Path(cache.url).rglob("*") if path.is_file()}
    assert list(repair(cache, [])) == []
    assert {path: path.read_bytes() for path in Path(cache.url).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: cut(path, 1000), lambda path: flip(path, 700)]
)
def test_samples_of_a_broken_shard_are_encoded_again_into_another_one(
    cache: Cache, write_shard: ShardMaker, damage
) -> None:
    expected = StreamReader(cache.store).latent(cache.read_index()["latent"][1].as_py())
    damage(shard_of(cache))
    again, done = mended(cache)
    assert samples(again) == [3]
    assert "3 samples removed" in "\n".join(done)
    encode_again(again, write_shard, [0, 1, 2])
    index = again.read_index()
    assert samples(again) == [0, 1, 2, 3]
    row = next(row for row in index.to_pylist() if int(row["sample"], 16) == 1)
    assert row["latent"]["generation"] == 1
    assert torch.equal(StreamReader(again.store).latent(row["latent"]), expected)
    assert not [finding for finding in check_files(again) if finding.is_fault]


def test_a_fragment_that_cannot_be_used_is_moved_aside(cache: Cache, write_shard: ShardMaker) -> None:
    cut(fragment_of(cache), 100)
    broken = fragment_of(cache).read_bytes()
    again, done = mended(cache)
    assert done == [f"index/{'a' * 32}.parquet: moved to broken/index/{'a' * 32}.parquet; the next job makes it anew"]
    assert path_of(again, f"broken/index/{'a' * 32}.parquet").read_bytes() == broken
    assert samples(again) == [3]
    assert write_shard(again.url, [0, 1, 2], shard_id="a" * 32).created
    assert samples(again) == [0, 1, 2, 3]


def test_a_fragment_that_does_not_fit_its_sound_shard_is_moved_aside(cache: Cache, write_shard: ShardMaker) -> None:
    rewrite_rows(cache, "a", lambda rows: rows[1:])
    again, _ = mended(cache)
    assert samples(again) == [3]
    assert write_shard(again.url, [0, 1, 2], shard_id="a" * 32).created
    assert samples(again) == [0, 1, 2, 3]


def test_latents_outlive_shared_texts_that_are_broken(cache: Cache) -> None:
    add_shared_texts(cache)
    flip(shard_of(cache, "d"), cache.shared_texts("text.t5")[text_id("two")]["offset"])
    again, done = mended(cache)
    assert "2 samples left with latents and without these texts" in "\n".join(done)
    assert samples(again) == [0, 1, 2, 3]
    assert again.shared_texts("text.t5") == {}
    committed = read_committed(again, "text.t5")
    assert committed.removed.by_sample() == {}
    counts = dict(zip(committed.samples(), committed.texts.num_captions().tolist(), strict=True))
    assert [counts[make_sample(number).sample] for number in range(4)] == [0, 2, 2, 0]


def test_texts_in_a_broken_shard_of_samples_are_gone_with_them_only(cache: Cache) -> None:
    add_shared_texts(cache)
    shard_of(cache, "b").unlink()
    again, _ = mended(cache)
    assert samples(again) == [0, 1, 2]
    assert len(again.shared_texts("text.t5")) == 2


def test_a_null_caption_that_is_broken_is_moved_aside(cache: Cache) -> None:
    write_null_caption(cache.store, "text.t5", torch.ones(1, 8))
    cut(path_of(cache, "null/text.t5.safetensors"), 20)
    again, _ = mended(cache)
    assert read_null_caption(again.store, "text.t5") is None


def test_only_leftovers_of_more_than_a_day_are_deleted(cache: Cache) -> None:
    old, new = Path(cache.url) / ".tmp-1-old", Path(cache.url) / ".tmp-1-new"
    for path in (old, new):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert list(repair(cache, [])) == [".tmp-1-old: deleted, a leftover of more than a day"]
    assert new.exists()
    assert not old.exists()


def test_a_broken_shard_that_only_a_snapshot_names_is_dropped(cache: Cache, write_shard: ShardMaker) -> None:
    compact(cache, 10**6)
    for fragment in cache.index_files().covered:
        cache.store.delete(fragment)
    shard = cache.read_index()["latent"][0].as_py()["shard"]
    flip(path_of(cache, shard), 700)
    again, done = mended(cache)
    assert "snapshot 2 takes its place" in "\n".join(done)
    left = samples(again)
    encode_again(again, write_shard, sorted({0, 1, 2, 3} - set(left)))
    assert samples(again) == [0, 1, 2, 3]


def test_shared_texts_of_a_snapshot_can_be_encoded_again(cache: Cache) -> None:
    add_shared_texts(cache)
    compact(cache, 10**6)
    shard_of(cache, "d").unlink()
    again, _ = mended(cache)
    assert samples(again) == [0, 1, 2, 3]
    assert again.shared_texts("text.t5") == {}
    add_shared_texts(again)
    assert len(again.shared_texts("text.t5")) == 2


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut(path, 100)])
def test_fragments_count_again_where_a_snapshot_lost_its_rows(cache: Cache, damage: Callable[[Path], object]) -> None:
    add_shared_texts(cache)
    before = cache.read_index().to_pylist()
    compact(cache, 10**6)
    part = next(path for path in cache.index_files().parts if "/rows-" in path)
    damage(path_of(cache, part))
    again, _ = mended(cache)
    rows = {row["sample"]: row for row in again.read_index().to_pylist()}
    assert rows == {row["sample"]: row for row in before}


def test_a_broken_snapshot_gives_way_to_the_fragments(cache: Cache) -> None:
    before = cache.read_index().to_pylist()
    compact(cache, 10**6)
    snapshot = cache.index_files().snapshot
    assert snapshot is not None
    cut(path_of(cache, snapshot), 100)
    again, _ = mended(cache)
    assert again.read_index().to_pylist() == before


def test_a_cache_that_cannot_be_written_is_said_so(cache: Cache) -> None:
    cut(fragment_of(cache), 100)
    (Path(cache.url) / "broken").write_bytes(b"in the way")
    _, faults = open_for_check(cache.url)
    with pytest.raises(InputError, match="broken"):
        list(repair(cache, [*faults, *check_files(cache)]))
    assert fragment_of(cache).exists()


def test_without_a_description_nothing_is_touched(cache: Cache) -> None:
    cut(path_of(cache, "dataset.json"), 20)
    cut(fragment_of(cache), 100)
    opened, faults = open_for_check(cache.url)
    with pytest.raises(InputError, match=r"without a sound dataset\.json"):
        list(repair(opened, [*faults, *check_files(opened)]))
    assert fragment_of(cache).exists()


def add_a_stream(cache: Cache) -> str:
    """Adds a stream in which sample 3 has a text; returns where the stream is described."""
    Cache.open_or_create(cache.url, {**PROVENANCE, "text.clip": PROVENANCE["text.t5"]})
    record = {"kind": "samples", "clips_root": "clips", "environment": {}}
    with ShardWriter(cache.store, shard_id="c" * 32, folder="text.clip", container="tar", record=record) as writer:
        text = Text(id=text_id("three"), caption="three", embedding=torch.ones(4, 8))
        writer.add(*text_row(make_sample(3).sample, "text.clip", [text], BFLOAT16, 0))
        writer.commit()
    return "streams/text.clip.json"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut(path, 20)])
def test_a_stream_whose_description_is_lost_is_left_alone_until_it_is_brought_back(
    cache: Cache, damage: Callable[[Path], object]
) -> None:
    description = path_of(cache, add_a_stream(cache))
    content, before = description.read_bytes(), Cache.open(cache.url).read_index().to_pylist()
    damage(description)
    opened, faults = open_for_check(cache.url)
    faults += [finding for finding in check_files(opened) if finding.is_fault]
    assert "dataset.json" not in [finding.path for finding in faults]
    with pytest.raises(InputError, match=r"without a sound streams/text\.clip\.json nothing is repaired"):
        list(repair(opened, faults))
    description.write_bytes(content)
    opened, faults = open_for_check(cache.url)
    assert [*faults, *(finding for finding in check_files(opened) if finding.is_fault)] == []
    assert opened.read_index().to_pylist() == before


def test_shared_texts_of_a_stream_whose_description_is_lost_are_left_alone(cache: Cache) -> None:
    description = path_of(cache, add_a_stream(cache))
    record = {"kind": "texts", "clips_root": "clips", "environment": {}}
    with ShardWriter(cache.store, shard_id="d" * 32, folder="text.clip", container="tar", record=record) as writer:
        text = Text(id=text_id("one"), caption="one", embedding=torch.ones(4, 8))
        writer.add(*shared_text_row("text.clip", text, BFLOAT16))
        writer.commit()
    fragment_of(cache, "c").unlink()
    description.unlink()
    opened, faults = open_for_check(cache.url)
    faults += [finding for finding in check_files(opened) if finding.is_fault]
    with pytest.raises(InputError, match="bring it back first"):
        list(repair(opened, faults))
    assert fragment_of(cache, "d").exists()


def test_what_the_next_job_makes_anew_of_a_lost_part_counts(cache: Cache, write_shard: ShardMaker) -> None:
    before = cache.read_index(["source"]).to_pylist()
    compact(cache, 10**6)
    sweep(cache, timedelta(0))
    lost = next(path for path in cache.index_files().parts if "/rows-" in path)
    path_of(cache, lost).write_bytes(b"junk")
    again, _ = mended(cache)
    assert samples(again) == []
    assert write_shard(again.url, [0, 1, 2], shard_id="a" * 32).created
    assert write_shard(again.url, [3], shard_id="b" * 32).created
    assert again.read_index(["source"]).to_pylist() == before


def test_shared_texts_of_a_lost_part_can_be_made_anew(cache: Cache) -> None:
    add_shared_texts(cache)
    compact(cache, 10**6)
    sweep(cache, timedelta(0))
    lost = next(path for path in cache.index_files().parts if "/texts-" in path)
    path_of(cache, lost).write_bytes(b"junk")
    again, _ = mended(cache)
    assert again.shared_texts("text.t5") == {}
    add_shared_texts(again)
    assert set(again.shared_texts("text.t5")) == {text_id(caption) for caption in SHARED_TEXTS}
    assert not [finding for finding in check_files(again) if finding.is_fault]


@pytest.mark.parametrize("is_swept", [False, True])
def test_where_it_is_lost_which_samples_were_removed_that_is_said(
    cache: Cache, write_shard: ShardMaker, is_swept: bool
) -> None:
    remove_samples(cache, [make_sample(3).sample])
    compact(cache, 10**6)
    if is_swept:
        sweep(cache, timedelta(0))
    lost = next(path for path in cache.index_files().parts if "/removed-" in path)
    path_of(cache, lost).write_bytes(b"junk")
    again, done = mended(cache)
    assert "which samples were removed is known only as far as fragments say so" in "\n".join(done)
    assert samples(again) == [0, 1, 2]
    assert read_committed(again, "text.t5").removed.by_sample() == ({} if is_swept else {make_sample(3).sample: 0})
    if is_swept:
        assert write_shard(again.url, [3], shard_id="b" * 32).created
        assert samples(again) == [0, 1, 2, 3]


def test_rows_of_sound_parts_count_where_another_part_is_lost(cache: Cache) -> None:
    add_shared_texts(cache)
    remove_samples(cache, [make_sample(1).sample])
    compact(cache, 10**6)
    before = cache.read_index().to_pylist()
    lost = next(path for path in cache.index_files().parts if "/texts-" in path)
    path_of(cache, lost).unlink()
    again, _ = mended(cache)
    assert again.read_index().to_pylist() == before
    assert len(again.shared_texts("text.t5")) == 2
