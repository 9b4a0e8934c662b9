"""Planning is pure: clips and their facts in, shards out."""

import dataclasses
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Literal

from preprocess.plan import Plan, SampleTask, make_plan
from shared.cache.dataset import CommittedSample
from shared.media.manifest import Clip
from shared.media.probe import Probe
from shared.media.video import Window
from shared.spec import Bucket

WIDE, SQUARE, SMALL = Bucket(16, 256, 448), Bucket(16, 256, 256), Bucket(8, 64, 64)


def clip(
    name: str, *, num_frames: int = 30, height: int = 360, width: int = 640, version: str = "1"
) -> tuple[Clip, Probe]:
    """Returns a clip and its facts."""
    return (
        Clip(source=name, path=Path("folder") / name, captions=("a caption",)),
        Probe(version=version, num_frames=num_frames, height=height, width=width, fps=Fraction(24)),
    )


def plan(
    clips: list[tuple[Clip, Probe]],
    buckets: tuple[Bucket, ...] = (SQUARE,),
    *,
    buckets_per_clip: Literal["best", "all"] = "best",
    committed: dict[str, CommittedSample] | None = None,
    removed: dict[str, int] | None = None,
    sources: set[str] | None = None,
    refused: set[str] | None = None,
    frame_interval: int = 1,
    shard_samples: int = 4,
) -> Plan:
    """Returns the plan of these clips."""
    return make_plan(
        clips,
        sources={found.source for found, _ in clips} if sources is None else sources,
        buckets=buckets,
        buckets_per_clip=buckets_per_clip,
        frame_interval=frame_interval,
        shard_samples=lambda _: shard_samples,
        sample_bytes=lambda _, num_captions: num_captions * 250_000_000,
        streams=("latent", "text.t5"),
        committed=committed or {},
        removed=removed or {},
        refused=refused or set(),
    )


def samples(made: Plan) -> list[str]:
    """Returns the identities of all planned samples, in order."""
    return [sample.sample for task in made.tasks for sample in task.samples]


def known(tasks: Iterable[SampleTask]) -> dict[str, CommittedSample]:
    """Returns samples as a cache knows them once they are encoded."""
    return {
        task.sample: CommittedSample(
            source=task.source, source_version=task.source_version, generation=0, captions=(), text_generation=0
        )
        for task in tasks
    }


def test_clips_fill_shards_in_the_order_of_the_manifest() -> None:
    made = plan([clip(f"{n}.mp4") for n in range(10)])
    assert [[sample.source for sample in task.samples] for task in made.tasks] == [
        ["0.mp4", "1.mp4", "2.mp4", "3.mp4"],
        ["4.mp4", "5.mp4", "6.mp4", "7.mp4"],
        ["8.mp4", "9.mp4"],
    ]
    assert made.num_samples == len(set(samples(made))) == 10


def test_what_is_committed_or_refused_is_not_planned_again() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    whole = plan(clips)
    done = known(whole.tasks[1].samples)
    ledger = {whole.tasks[2].samples[0].sample}
    rest = plan(clips, committed=done, refused=ledger)
    assert (len(rest.committed), rest.num_refused_before, rest.num_samples) == (4, 1, 5)
    assert rest.tasks[0] == whole.tasks[0]
    assert set(samples(rest)) == set(samples(whole)) - done.keys() - ledger


def test_a_finished_cache_leaves_nothing_to_do() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    made = plan(clips, committed=known([sample for task in plan(clips).tasks for sample in task.samples]))
    assert (made.tasks, made.stale) == ((), ())


def test_samples_of_clips_that_changed_or_are_named_no_more_are_stale() -> None:
    done = known([sample for name in "abc" for task in plan([clip(name)]).tasks for sample in task.samples])
    first, second, third = done
    made = plan([clip("a"), clip("b", version="2")], committed=done)
    assert made.stale == (second, third)
    assert [sample for sample, _ in made.committed] == [first]
    assert made.num_samples == 1


def test_samples_of_a_clip_that_cannot_be_probed_now_are_not_stale() -> None:
    done = known(plan([clip("a")]).tasks[0].samples)
    assert plan([], committed=done, sources={"a"}).stale == ()


def test_a_removed_sample_is_encoded_again_in_a_shard_of_its_own_name() -> None:
    first = plan([clip("a"), clip("b")])
    again = plan([clip("a"), clip("b")], removed={samples(first)[0]: 2})
    assert [(task.generation, len(task.samples)) for task in again.tasks] == [(0, 1), (3, 1)]
    whole = plan([clip("a")], removed={samples(first)[0]: 2})
    assert whole.tasks[0].shard_id != plan([clip("a")]).tasks[0].shard_id


def test_samples_of_many_captions_do_not_make_a_shard_of_more_than_a_gigabyte() -> None:
    many = clip("many")[0]
    clips = [clip("a"), clip("b"), (dataclasses.replace(many, captions=("1", "2", "3", "4")), clip("many")[1])]
    made = plan([*clips, clip("c"), clip("d"), clip("e"), clip("f")])
    assert [[s.source for s in task.samples] for task in made.tasks] == [["a", "b"], ["many"], ["c", "d", "e", "f"]]


def test_a_changed_file_another_bucket_and_another_interval_are_other_samples() -> None:
    identities = {
        samples(plan([clip("a.mp4")]))[0],
        samples(plan([clip("b.mp4")]))[0],
        samples(plan([clip("a.mp4", version="2")]))[0],
        samples(plan([clip("a.mp4")], (SMALL,)))[0],
        samples(plan([clip("a.mp4")], frame_interval=2, buckets=(SMALL,)))[0],
    }
    assert len(identities) == 5


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
    assert made.refusals == ()


def test_a_clip_that_fills_no_bucket_is_refused_with_the_reason() -> None:
    made = plan([clip("short", num_frames=15), clip("low", height=255), clip("fits", num_frames=16, height=256)])
    assert [(r.source, r.reason, r.detail) for r in made.refusals] == [
        ("short", "too_short", "15 frames: bucket 16x256x256 takes 16"),
        ("low", "too_small", "640x255 pixels: bucket 16x256x256 takes 256x256"),
    ]
    assert [sample.source for sample in made.tasks[0].samples] == ["fits"]


def test_frames_come_from_the_middle_at_the_interval() -> None:
    made = plan([clip("a", num_frames=50)], frame_interval=3)
    sample = made.tasks[0].samples[0]
    assert sample.window == Window(start=2, interval=3, num_frames=16)
    assert sample.fps == 8.0
    assert plan([clip("a", num_frames=45)], frame_interval=3).refusals[0].reason == "too_short"


def test_the_plan_does_not_depend_on_anything_but_its_arguments() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    assert plan(clips) == plan(clips)
