"""Planning is pure: clips and their facts in, shards out."""

from fractions import Fraction
from pathlib import Path
from typing import Literal

from preprocess.plan import Plan, make_plan
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
    committed: dict[str, tuple[str, ...]] | None = None,
    refused: set[str] | None = None,
    frame_interval: int = 1,
    shard_samples: int = 4,
) -> Plan:
    """Returns the plan of these clips."""
    return make_plan(
        clips,
        buckets=buckets,
        buckets_per_clip=buckets_per_clip,
        frame_interval=frame_interval,
        shard_samples=shard_samples,
        committed=committed or {},
        refused=refused or set(),
    )


def samples(made: Plan) -> list[str]:
    """Returns the identities of all planned samples, in order."""
    return [sample.sample for task in made.tasks for sample in task.samples]


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
    done = {sample.sample: sample.captions for sample in whole.tasks[1].samples}
    ledger = {whole.tasks[2].samples[0].sample}
    rest = plan(clips, committed=done, refused=ledger)
    assert (rest.num_committed, rest.num_refused_before, rest.num_samples) == (4, 1, 5)
    assert rest.tasks[0] == whole.tasks[0]
    assert set(samples(rest)) == set(samples(whole)) - done.keys() - ledger


def test_a_finished_cache_leaves_nothing_to_do() -> None:
    clips = [clip(f"{n}.mp4") for n in range(10)]
    assert plan(clips, committed=dict.fromkeys(samples(plan(clips)), ("a caption",))).tasks == ()


def test_a_changed_caption_is_counted_and_not_encoded_again() -> None:
    done = dict.fromkeys(samples(plan([clip("a.mp4"), clip("b.mp4")])), ("a caption",))
    done[next(iter(done))] = ("another caption",)
    made = plan([clip("a.mp4"), clip("b.mp4")], committed=done)
    assert (made.num_committed, made.num_other_captions, made.num_samples) == (2, 1, 0)


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
