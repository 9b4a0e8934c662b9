"""All that a job has to do, from manifest, probes and cache."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from preprocess.work import Work, find_work
from shared.cache.compact import compact
from shared.cache.dataset import Cache
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.removal import remove_samples
from shared.errors import InputError
from shared.media.clip import TimeRange
from tests.shared.clips.planning import PROVENANCE, ClipOfTest, add_committed, clip, manifest_of, probes_of

CLIPS = [clip("a"), clip("b", captions=("One", "two")), clip("c"), clip("c", time_range=TimeRange(start=1.0))]


class Job:
    """A cache, and what a job would find to do in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.cache = Cache.open_or_create(folder / "cache", PROVENANCE)

    def work(
        self,
        clips: Sequence[ClipOfTest],
        *,
        refused: Sequence[str] = (),
        sources: Sequence[str] | None = None,
        **options: object,
    ) -> Work:
        """Returns the work of a manifest of these clips."""
        self.number += 1
        config = PreprocessConfig(
            **{"preset": "demo", "buckets": ("16x256x256",), **options},  # type: ignore[arg-type]
            manifest="unused.csv",
            output=self.cache.url,
        )
        manifest = manifest_of([made.clip for made in clips], refused)
        probes = None if config.only_texts else probes_of(self.folder / str(self.number), manifest, clips)
        return find_work(config, manifest, probes, self.cache, sources=sources)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def sources(work: Work) -> list[str]:
    """Returns the clips that are to be encoded."""
    return [sample.source for task in work.shards for sample in task.samples]


def test_what_is_committed_is_not_encoded_again_and_stays_so_after_compaction(job: Job) -> None:
    first = job.work(CLIPS)
    assert sources(first) == ["a", "b", "c", "c"]
    add_committed(job.cache, list(first.shards))
    for _ in range(2):
        again = job.work([*CLIPS, clip("d")])
        assert (sources(again), again.num_committed, list(again.stale)) == (["d"], 4, [])
        assert (list(again.texts), list(again.shared_texts)) == ([], [])
        compact(job.cache, 1 << 30)


def test_windows_mirrored_ones_and_rates_are_committed_under_their_own_names(job: Job) -> None:
    options = {"windows_per_clip": 3, "flip": True, "fps": 8.0}
    clips = [clip("long", num_frames=24 * 30), clip("short", num_frames=60)]
    first = job.work(clips, **options)
    add_committed(job.cache, list(first.shards))
    assert job.work(clips, **options).num_committed == len(sources(first)) == 6 + 2
    rows = job.cache.read_index().to_pylist()
    assert {row["sampling_fps"] for row in rows} == {8.0}
    assert sorted((row["source"], row["window"], bool(row["flip"])) for row in rows) == [
        *(("long", start, flip) for start in (0, 112, 224) for flip in (False, True)),
        ("short", 2, False),
        ("short", 2, True),
    ]


def test_samples_of_clips_that_changed_or_are_named_no_more_are_stale(job: Job) -> None:
    add_committed(job.cache, list(job.work(CLIPS).shards))
    rows = {(row["source"], row["start"]): row["sample"] for row in job.cache.read_index().to_pylist()}
    found = job.work([clip("a"), clip("b", version="2"), clip("c")])
    assert set(found.stale) == {rows["b", None], rows["c", 1.0]}
    assert sources(found) == ["b"]


def test_samples_of_a_clip_that_cannot_be_used_now_or_whose_row_is_refused_are_not_stale(job: Job) -> None:
    add_committed(job.cache, list(job.work([clip("a"), clip("b"), clip("c")]).shards))
    found = job.work([clip("a", reason="empty"), clip("c")], refused=["b"])
    assert list(found.stale) == []
    assert [(refusal.source, refusal.reason) for refusal in found.refusals] == [("a", "empty")]


def test_samples_of_buckets_that_are_not_asked_for_now_are_not_stale(job: Job) -> None:
    add_committed(job.cache, list(job.work(CLIPS).shards))
    found = job.work(CLIPS, buckets=("8x64x64",))
    assert (found.num_committed, list(found.stale), len(sources(found))) == (0, [], 4)


def test_sources_that_were_probed_anew_give_the_work_of_their_clips_alone(job: Job) -> None:
    add_committed(job.cache, list(job.work([clip("a"), clip("b")]).shards))
    now = [clip("a", version="2"), clip("b", version="2", num_frames=20), clip("c")]
    found = job.work(now, sources=["b"])
    assert (sources(found), list(found.stale)) == (["b"], [])
    assert found.shards[0].samples[0].window.start == 2


def test_samples_in_the_ledger_are_left_out_until_their_reason_is_tried_again(job: Job) -> None:
    (task,) = job.work([clip("a"), clip("b"), clip("c")]).shards
    reasons = ("not_decodable", "not_storable", "not_decodable")
    write_ledger(
        job.cache.store,
        [
            Refusal(source=sample.source, sample=sample.sample, reason=reason, detail="")
            for sample, reason in zip(task.samples, reasons, strict=True)
        ],
    )
    write_ledger(job.cache.store, [Refusal(source="b", reason="missing", detail="")])
    assert job.work([clip("a"), clip("b"), clip("c")]).num_refused_before == 3
    again = job.work([clip("a"), clip("b"), clip("c")], retry_refused=("not_decodable",))
    assert (sources(again), again.num_refused_before) == (["a", "c"], 1)


def test_a_removed_sample_is_encoded_in_the_next_generation(job: Job) -> None:
    first = job.work(CLIPS)
    add_committed(job.cache, list(first.shards))
    remove_samples(job.cache, [first.shards[0].samples[0].sample])
    again = job.work(CLIPS)
    assert [(task.generation, [sample.source for sample in task.samples]) for task in again.shards] == [(1, ["a"])]


def test_captions_that_changed_are_encoded_alone(job: Job) -> None:
    add_committed(job.cache, list(job.work(CLIPS).shards))
    found = job.work([clip("a", captions=("another",)), *CLIPS[1:]])
    assert sources(found) == []
    ((sample,),) = [task.samples for task in found.texts]
    assert ([text.caption for text in sample.captions], sample.generation) == (["another"], 1)


def test_a_second_text_encoder_gets_the_captions_of_the_clips_that_are_still_named(job: Job) -> None:
    add_committed(job.cache, list(job.work(CLIPS).shards))
    Cache.open_or_create(job.cache.url, {"text.other": PROVENANCE["text.t5"]})
    job.cache = Cache.open(job.cache.url)
    found = job.work(CLIPS[1:], only_texts=True, text_stream="text.other", vae=None)
    samples = [sample for task in found.texts for sample in task.samples]
    assert sorted(tuple(text.caption for text in sample.captions) for sample in samples) == [
        ("One", "two"),
        ("a caption",),
        ("a caption",),
    ]
    assert (len(found.shards), found.num_committed, list(found.stale)) == (0, 3, [])


def test_captions_that_samples_share_are_planned_once(job: Job) -> None:
    found = job.work([*CLIPS, clip("d", captions=("a caption", "two"))], share_text=True, cleaning="none")
    (task,) = found.shared_texts
    assert sorted(text.caption for text in task.captions) == ["One", "a caption", "two"]
    assert found.shared_texts.text_ids.of(["One", "a caption", "two"]) == {text.id for text in task.captions}


def test_shards_that_would_be_too_large_are_refused(job: Job) -> None:
    with pytest.raises(InputError, match="--shard-samples 100000: shards of bucket 16x256x256 would exceed 1 GB"):
        job.work(CLIPS, shard_samples=100_000)
