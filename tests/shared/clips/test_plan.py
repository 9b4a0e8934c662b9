"""Planning is pure: clips and their facts in, shards out."""

import resource
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.bucket_presets import parse_buckets
from shared.bucketing import PerClip
from shared.cache.committed import Removed
from shared.cache.identity import identity_numbers, identity_texts, latent_id
from shared.clips.plan import BucketTotals, Plan, PlanOptions, SampleTask, make_plan
from shared.clips.probe_parts import SCHEMA
from shared.fingerprints import Lookup
from shared.media.clip import TimeRange, Window
from shared.media.manifest import Manifest
from shared.spec import Bucket
from shared.windows import Sampling
from tests.shared.clips.planning import ClipOfTest, clip, manifest_of, probes_of

WIDE, SQUARE, SMALL, STILL = Bucket(16, 256, 448), Bucket(16, 256, 256), Bucket(8, 64, 64), Bucket(1, 64, 64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    """Where the probes of a test lie."""
    _Folder.path, _Folder.number = tmp_path, 0


class _Folder:
    path = Path()
    number = 0


def plan(
    clips: list[ClipOfTest],
    buckets: tuple[Bucket, ...] = (SQUARE,),
    *,
    buckets_per_clip: PerClip = "best",
    committed: Collection[str] = (),
    removed: dict[str, int] | None = None,
    refused: Collection[str] = (),
    frame_interval: int = 1,
    fps: float | None = None,
    windows: int = 1,
    flip: bool = False,
    shard_samples: int = 4,
    rows: list[int] | None = None,
) -> Plan:
    """Returns the plan of these clips."""
    _Folder.number += 1
    manifest = manifest_of(made.clip for made in clips)
    return make_plan(
        manifest,
        probes_of(_Folder.path / str(_Folder.number), manifest, clips),
        PlanOptions(
            buckets=buckets,
            buckets_per_clip=buckets_per_clip,
            sampling=Sampling(frame_interval=frame_interval, fps=fps),
            windows_per_clip=windows,
            flip=flip,
            shard_samples=lambda _: shard_samples,
            sample_bytes=lambda _, num_captions: num_captions * 250_000_000,
            streams=("latent", "text.t5"),
        ),
        committed=Lookup(identity_numbers(list(committed))),
        removed=Removed.of(removed or {}),
        refused=Lookup(identity_numbers(list(refused))),
        rows=None if rows is None else np.array(rows),
    )


def tasks_of(made: Plan) -> list[SampleTask]:
    """Returns all planned samples, in order."""
    return [sample for task in made.tasks for sample in task.samples]


def samples(made: Plan) -> list[str]:
    """Returns the identities of all planned samples, in order."""
    return [sample.sample for sample in tasks_of(made)]


def sources(made: Plan) -> list[list[str]]:
    """Returns the clips of each shard."""
    return [[sample.source for sample in task.samples] for task in made.tasks]


def test_clips_fill_shards_in_the_order_of_the_manifest() -> None:
    made = plan([clip(f"{n}.mp4") for n in range(10)])
    assert sources(made) == [
        ["0.mp4", "1.mp4", "2.mp4", "3.mp4"],
        ["4.mp4", "5.mp4", "6.mp4", "7.mp4"],
        ["8.mp4", "9.mp4"],
    ]
    assert made.num_samples == len(set(samples(made))) == 10


def test_a_task_says_all_that_the_manifest_and_probing_say_of_its_clip() -> None:
    captions, columns = ("one", "two"), {"aesthetic": 5.5, "camera": "pan"}
    only = clip("a.mp4", num_frames=50, version="7-x", captions=captions, columns=dict(columns))
    (found,) = tasks_of(plan([only], frame_interval=3))
    assert found == SampleTask(
        sample=latent_id(source="a.mp4", source_version="7-x", bucket=SQUARE, frame_interval=3),
        source="a.mp4",
        source_version="7-x",
        media=only.clip.media,
        time_range=None,
        captions=captions,
        window=Window(start=2, interval=3, num_frames=16),
        is_centre=True,
        fps=8.0,
        columns=columns,
    )
    assert found.stored_window is None


def test_shards_in_columns_say_what_their_tasks_do() -> None:
    tasks = plan([clip(f"{n}.mp4", num_frames=70) for n in range(6)], windows=3, flip=True).tasks
    for place, task in enumerate(tasks):
        rows = tasks.rows(place)
        assert (rows.shard_id, rows.bucket) == (task.shard_id, task.bucket)
        assert identity_texts(rows.numbers) == [sample.sample for sample in task.samples]
        assert [f"{clip}.mp4" for clip in rows.clips.tolist()] == [sample.source for sample in task.samples]
        windows = [(sample.window.start, sample.window.flip) for sample in task.samples]
        assert [(start, rows.variant.flip) for start in rows.starts.tolist()] == windows
    assert {tasks.rows(place).variant.number for place in range(len(tasks))} == {0, 1, 2}


def test_a_slice_of_the_shards_is_a_sequence_of_shards() -> None:
    tasks = plan([clip(f"{n}.mp4") for n in range(21)]).tasks
    assert [task.shard_id for task in tasks[1::2]] == [tasks[place].shard_id for place in (1, 3, 5)]
    assert tasks[1::2].num_samples == 4 + 4 + 1
    assert [len(task.samples) for task in tasks] == [4, 4, 4, 4, 4, 1]
    assert tasks[-1] == tasks[5]
    assert tasks[4:].clip_rows().tolist() == [16, 17, 18, 19, 20]
    totals = BucketTotals(num_clips=21, num_samples=21, num_shards=6, num_captions=21)
    assert tasks.per_bucket() == {SQUARE: totals}


def test_what_is_committed_or_refused_is_not_planned_again() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    whole = plan(clips)
    done = [sample.sample for sample in whole.tasks[1].samples]
    ledger = {whole.tasks[2].samples[0].sample}
    rest = plan(clips, committed=done, refused=ledger)
    assert [rows.tolist() for rows in rest.committed] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (rest.num_refused_before, rest.num_samples) == (1, 5)
    assert rest.tasks[0] == whole.tasks[0]
    assert set(samples(rest)) == set(samples(whole)) - set(done) - ledger


def test_a_finished_cache_leaves_nothing_to_do() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    made = plan(clips, committed=samples(plan(clips)))
    assert (len(made.tasks), made.num_samples, list(made.refusals)) == (0, 0, [])


def test_clips_that_are_not_probed_wait_and_clips_that_cannot_be_used_are_refused() -> None:
    clips = [clip("a"), clip("b", reason="not_a_video"), clip("c")]
    manifest = manifest_of([*(made.clip for made in clips), clip("not probed").clip])
    probes = probes_of(_Folder.path / "probes", manifest, clips)
    options = PlanOptions(
        buckets=(SQUARE,),
        buckets_per_clip="best",
        sampling=Sampling(),
        shard_samples=lambda _: 4,
        sample_bytes=lambda *_: 1,
        streams=("latent",),
    )
    nothing = Lookup(identity_numbers([]))
    made = make_plan(manifest, probes, options, committed=nothing, removed=Removed.of({}), refused=nothing)
    assert sources(made) == [["a", "c"]]
    assert [(r.source, r.reason, r.detail) for r in made.refusals] == [("b", "not_a_video", "because")]
    assert made.refusals.reasons() == {"not_a_video": 1}


def test_some_rows_of_a_manifest_can_be_planned_alone() -> None:
    clips = [clip(f"{n}") for n in range(9)]
    made = plan(clips, rows=[1, 7])
    assert sources(made) == [["1", "7"]]
    assert set(samples(made)) < set(samples(plan(clips)))


def test_a_removed_sample_is_encoded_again_in_a_shard_of_its_own_name() -> None:
    first = plan([clip("a"), clip("b")])
    again = plan([clip("a"), clip("b")], removed={samples(first)[0]: 2})
    assert [(task.generation, len(task.samples)) for task in again.tasks] == [(0, 1), (3, 1)]
    whole = plan([clip("a")], removed={samples(first)[0]: 2})
    assert whole.tasks[0].shard_id != plan([clip("a")]).tasks[0].shard_id


def test_samples_of_many_captions_do_not_make_a_shard_of_more_than_a_gigabyte() -> None:
    many = clip("many", captions=("1", "2", "3", "4"))
    made = plan([clip("a"), clip("b"), many, clip("c"), clip("d"), clip("e"), clip("f")])
    assert sources(made) == [["a", "b"], ["many"], ["c", "d", "e", "f"]]


def test_a_changed_file_another_bucket_and_another_interval_are_other_samples() -> None:
    identities = {
        samples(plan([clip("a.mp4")]))[0],
        samples(plan([clip("b.mp4")]))[0],
        samples(plan([clip("a.mp4", version="2")]))[0],
        samples(plan([clip("a.mp4")], (SMALL,)))[0],
        samples(plan([clip("a.mp4")], frame_interval=2, buckets=(SMALL,)))[0],
        samples(plan([clip("a.mp4")], fps=8.0, buckets=(SMALL,)))[0],
        samples(plan([clip("a.mp4")], fps=9.0, buckets=(SMALL,)))[0],
        samples(plan([clip("a.mp4", time_range=TimeRange(start=0.0))]))[0],
        samples(plan([clip("a.mp4", time_range=TimeRange(start=0.0, end=1.0))]))[0],
    }
    assert len(identities) == 9


def test_a_clip_goes_to_the_nearest_aspect_ratio_that_it_fills() -> None:
    made = plan([clip("wide"), clip("square", width=360), clip("short", num_frames=9)], (SMALL, SQUARE, WIDE))
    assert {task.bucket: [sample.source for sample in task.samples] for task in made.tasks} == {
        WIDE: ["wide"],
        SQUARE: ["square"],
        SMALL: ["short"],
    }


def test_a_clip_goes_to_every_bucket_that_it_fills_when_asked() -> None:
    made = plan([clip("wide"), clip("short", num_frames=9)], (SMALL, SQUARE, WIDE), buckets_per_clip="all")
    assert {task.bucket: len(task.samples) for task in made.tasks} == {SMALL: 2, SQUARE: 1, WIDE: 1}
    assert list(made.refusals) == []


def test_a_clip_that_fills_no_bucket_is_refused_with_the_reason() -> None:
    made = plan([clip("short", num_frames=15), clip("low", height=255), clip("fits", num_frames=16, height=256)])
    assert [(r.source, r.reason, r.detail) for r in made.refusals] == [
        ("short", "too_short", "15 frames: bucket 16x256x256 takes 16"),
        ("low", "too_small", "640x255 pixels: bucket 16x256x256 takes 256x256"),
    ]
    assert made.refusals.reasons() == {"too_short": 1, "too_small": 1}
    assert [sample.source for sample in made.tasks[0].samples] == ["fits"]


def test_frames_come_from_the_middle_at_the_interval() -> None:
    sample = tasks_of(plan([clip("a", num_frames=50)], frame_interval=3))[0]
    assert sample.window == Window(start=2, interval=3, num_frames=16)
    assert sample.fps == 8.0
    assert plan([clip("a", num_frames=45)], frame_interval=3).refusals[0].reason == "too_short"


def test_by_time_windows_are_counted_in_steps_of_the_rate() -> None:
    (sample,) = tasks_of(plan([clip("a", num_frames=30, fps=Fraction(10))], fps=8.0))
    assert sample.window == Window(start=4, num_frames=16, fps=8.0)
    assert (sample.fps, sample.stored_window) == (8.0, 4)
    assert sample.sample == latent_id(
        source="a", source_version="1", bucket=SQUARE, frame_interval=1, fps=8.0, window=4
    )


def test_a_part_of_a_clip_is_a_sample_of_its_own_and_keeps_its_times() -> None:
    part = TimeRange(start=1.5, end=4.0)
    whole, piece = tasks_of(plan([clip("a"), clip("a", time_range=part, num_frames=20)]))
    assert (whole.time_range, piece.time_range) == (None, part)
    assert (whole.stored_window, piece.stored_window) == (None, 2)
    assert whole.sample == latent_id(source="a", source_version="1", bucket=SQUARE, frame_interval=1)
    assert piece.sample == latent_id(
        source="a", source_version="1", bucket=SQUARE, frame_interval=1, time_range=part, window=2
    )


def test_images_go_to_buckets_of_one_frame_alone() -> None:
    made = plan([clip("image", num_frames=1, is_image=True), clip("video")], (SQUARE, STILL), buckets_per_clip="all")
    assert {task.bucket: [sample.source for sample in task.samples] for task in made.tasks} == {
        SQUARE: ["video"],
        STILL: ["image", "video"],
    }


def test_shards_of_other_windows_and_of_mirrored_ones_hold_the_same_clips_in_the_same_order() -> None:
    lengths = [16, 48, 500, 48, 20, 48, 48, 500, 48]
    made = plan([clip(f"{n}", num_frames=frames) for n, frames in enumerate(lengths)], windows=4, flip=True)
    variants: dict[tuple[str, ...], set[tuple[int, bool]]] = {}
    for task in made.tasks:
        names = tuple(sample.source for sample in task.samples)
        (flip,) = {sample.window.flip for sample in task.samples}
        starts = {sample.window.start for sample in task.samples}
        assert len(starts) == 1 or names in (("0", "4"),)
        assert (min(starts), flip) not in variants.setdefault(names, set())
        variants[names].add((min(starts), flip))
    assert {names: len(found) for names, found in variants.items()} == {
        ("0", "4"): 2,
        ("1", "3", "5", "6"): 6,
        ("8",): 6,
        ("2", "7"): 8,
    }
    assert made.num_samples == len(set(samples(made))) == 2 * 2 + 5 * 6 + 2 * 8


def test_more_windows_and_flips_keep_what_is_encoded_already() -> None:
    clips = [clip(f"{n}", num_frames=100 * n + 16) for n in range(6)]
    few = samples(plan(clips))
    more = samples(plan(clips, windows=3))
    most = samples(plan(clips, windows=5, flip=True))
    assert set(few) < set(more) < set(most)
    rest = plan(clips, windows=5, flip=True, committed=more)
    assert set(samples(rest)) == set(most) - set(more)
    for task in rest.tasks:
        assert len({(sample.window.flip, sample.is_centre) for sample in task.samples}) == 1


def test_the_plan_does_not_depend_on_anything_but_its_arguments() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    assert list(plan(clips).tasks) == list(plan(clips).tasks)


def test_shards_have_the_names_that_they_always_had() -> None:
    assert [task.shard_id for task in plan([clip("a"), clip("b")]).tasks] == ["883d42e7b50c2684d19623f8b7c688d1"]


def test_a_large_plan_takes_little_memory() -> None:
    count, random = 200_000, np.random.default_rng(0)
    names = pa.array([f"videos/part-{n // 1000:05d}/clip_{n:09d}.mp4" for n in range(count)])
    nothing = manifest_of([]).table.schema
    table = pa.table(
        {
            **{name: pa.nulls(count, nothing.field(name).type) for name in ("offset", "size", "start", "end")},
            "source": names,
            "url": names,
            "captions": pa.array([["a caption"]] * count),
        }
    ).select(nothing.names)
    facts = {
        "version": pa.array([f"{n}-{n:016x}" for n in range(count)]),
        "num_frames": random.integers(10, 400, count),
        "height": random.integers(200, 1100, count).astype(np.int32),
        "width": random.integers(200, 2000, count).astype(np.int32),
        "fps_num": np.full(count, 24),
        "fps_den": np.full(count, 1),
        "duration": random.uniform(1, 20, count),
        "is_image": np.zeros(count, bool),
        **{name: pa.nulls(count, SCHEMA.field(name).type) for name in ("reason", "detail")},
    }
    options = PlanOptions(
        buckets=parse_buckets(["16x240p", "16x480p", "16x720p"]),
        buckets_per_clip="best",
        sampling=Sampling(),
        windows_per_clip=2,
        shard_samples=lambda _: 512,
        sample_bytes=lambda *_: 1_000_000,
        streams=("latent", "text.t5"),
    )
    empty = Lookup(identity_numbers([]))
    manifest = Manifest(root="/", num_rows=count, table=table, refused=())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = make_plan(manifest, pa.table(facts), options, committed=empty, removed=Removed.of({}), refused=empty)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert made.num_samples > count
    assert sum(totals.num_samples for totals in made.tasks.per_bucket().values()) == made.num_samples
    assert grown < 300 * made.num_samples + 50_000_000
    assert len(made.tasks[-1].samples) == len(made.tasks.rows(len(made.tasks) - 1).clips)
