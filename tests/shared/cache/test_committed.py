"""The committed samples, as a planner sees them."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import torch

from shared.cache.check import check_files
from shared.cache.commit import ShardWriter
from shared.cache.committed import caption_sums, read_committed
from shared.cache.compact import compact
from shared.cache.dataset import Cache
from shared.cache.identity import identity_numbers, text_id
from shared.cache.removal import remove_samples
from shared.cache.rows import Text, describe, sample_row, text_row
from shared.cache.schema import rows_table
from shared.codec import Codec
from shared.media.clip import TimeRange
from tests.shared.cache.conftest import BUCKET, ShardMaker, make_sample

CODECS = {"latent": Codec(values="bfloat16"), "text.t5": Codec(values="bfloat16")}


def sums(*captions: str) -> int:
    """Returns the number by which captions of a sample are compared."""
    return int(caption_sums(pa.array([list(captions)]))[0])


def test_samples_captions_and_removals_are_found_by_identity(cache: Cache, write_shard: ShardMaker) -> None:
    remove_samples(cache, [f"{1:032x}"])
    write_shard(cache.url, [3], shard_id="c" * 32, generation=2)
    assert remove_samples(cache, [f"{3:032x}"]) == 1
    write_shard(cache.url, [3], shard_id="d" * 32, generation=3)
    found = read_committed(cache, "text.t5")
    wanted = identity_numbers([f"{number:032x}" for number in (0, 1, 2, 3, 4)])
    places = found.lookup.find(wanted)
    assert (places >= 0).tolist() == [True, False, True, True, False]
    assert found.generations[places[[0, 2, 3]]].tolist() == [0, 0, 3]
    for number, place in ((0, places[0]), (3, places[3])):
        assert found.texts.captions[place] == sums("Another, longer caption", f"Caption {number}")
        assert found.texts.captions[place] != sums(f"Caption {number}")
        assert found.texts.ids_of(int(place)) == {text_id(f"Caption {number}"), text_id("Another, longer caption")}
    assert found.removed.next_generations(wanted).tolist() == [0, 1, 0, 3, 0]


def test_texts_that_were_encoded_later_are_those_that_count(cache: Cache) -> None:
    texts = [Text(id=text_id("new"), caption="new", embedding=torch.zeros(2, 8))]
    for name, number in (("d", 2), ("e", 0)):
        row, arrays = text_row(f"{number:032x}", "text.t5", texts, CODECS["text.t5"], 1)
        with ShardWriter(cache.store, shard_id=name * 32, folder="text.t5", container="tar", record={}) as writer:
            writer.add(row, arrays)
            writer.commit()
    for _ in range(2):
        found = read_committed(cache, "text.t5")
        order = np.argsort(found.numbers[:, 1])
        assert found.texts.generations[order].tolist() == [1, 0, 1, 0]
        assert found.texts.num_captions()[order].tolist() == [1, 2, 1, 2]
        assert [found.texts.ids_of(int(row)) == {text_id("new")} for row in order] == [True, False, True, False]
        assert (found.texts.captions[order] == sums("new")).tolist() == [True, False, True, False]
        compact(cache, 1 << 30)


def test_a_stream_that_no_sample_has_is_empty(cache: Cache) -> None:
    found = read_committed(cache, "text.other")
    assert found.texts.generations.tolist() == [-1] * 4
    assert found.texts.num_captions().tolist() == [0] * 4


def test_windows_and_parts_of_clips_keep_their_place_through_index_checks_and_compaction(cache: Cache) -> None:
    plain = make_sample(7)
    part = dataclasses.replace(
        make_sample(8), time_range=TimeRange(start=0.0, end=2.5), window=3, sampling_fps=8.0, flip=True
    )
    with ShardWriter(
        cache.store, shard_id="d" * 32, folder=str(BUCKET), container="tar", record={"kind": "samples"}
    ) as writer:
        for sample in (plain, part):
            writer.add(*sample_row(sample, CODECS, 0))
        writer.commit()
    assert not [finding for finding in check_files(cache) if finding.is_fault]
    for _ in range(2):
        rows = {row["sample"]: row for row in cache.read_index().to_pylist()}
        names = ("start", "end", "sampling_fps", "window", "flip")
        assert [rows[part.sample][name] for name in names] == [0.0, 2.5, 8.0, 3, True]
        assert [rows[plain.sample][name] for name in names] == [None] * 5
        found = read_committed(cache, "text.t5")
        clips = {
            source: (start, end)
            for _, table in found.clips(np.arange(len(found)))
            for source, _, start, end in zip(*table.to_pydict().values(), strict=True)
        }
        assert clips[part.source] == (0.0, 2.5)
        assert clips[plain.source] == (None, None)
        compact(cache, 1 << 30)


def test_rows_of_one_fragment_need_not_have_the_same_columns() -> None:
    rows = [sample_row(dataclasses.replace(make_sample(n), window=n or None), CODECS, 0)[0] for n in range(2)]
    assert rows_table(rows)["window"].to_pylist() == [None, 1]
    assert rows_table(rows[::-1])["window"].to_pylist() == [1, None]
    assert "flip" not in rows_table(rows).column_names


def test_the_json_beside_a_sample_says_which_part_of_its_source_it_is() -> None:
    plain, part = make_sample(0), dataclasses.replace(make_sample(1), time_range=TimeRange(start=0.0), window=0)
    described = [json.loads(describe(*sample_row(sample, CODECS, 0))) for sample in (plain, part)]
    names = ("start", "end", "sampling_fps", "window", "flip")
    assert [{name: about[name] for name in names if name in about} for about in described] == [
        {},
        {"start": 0.0, "window": 0},
    ]
