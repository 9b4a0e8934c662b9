"""Decoding ahead: what is asked for, how much at a time, and what a dead task costs. Tasks are plain objects here."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from preprocess.decode_ahead import DecodeAhead, Pending, TaskDiedError, frame_bytes
from shared.cache.ledger import Refusal
from shared.clips.decode import Frames, Postponed, postpone, refuse
from shared.clips.plan import SampleTask, ShardTask
from shared.media.clip import Media, Window
from shared.spec import Bucket

BUCKET = Bucket(2, 8, 8)
LARGE = Bucket(16, 512, 512)


def _shard(names: str, bucket: Bucket = BUCKET) -> ShardTask:
    samples = tuple(
        SampleTask(
            sample=name,
            source=f"{name}.mp4",
            source_version="1",
            media=Media(url=f"/clips/{name}.mp4"),
            time_range=None,
            captions=("a clip",),
            window=Window(start=0, num_frames=bucket.num_frames),
            is_centre=True,
            fps=8.0,
        )
        for name in names
    )
    return ShardTask(shard_id=names, bucket=bucket, samples=samples)


class Decoders:
    """Decodes at once; samples whose name is in ``deadly`` end their task, those in ``lost`` lose its node once."""

    def __init__(self, deadly: str = "", lost: str = "") -> None:
        self.deadly, self.lost = deadly, set(lost)
        self.submitted: list[str] = []
        self.taken: list[str] = []

    def submit(self, samples: Sequence[SampleTask], bucket: Bucket) -> Pending:
        self.submitted.append("".join(sample.sample for sample in samples))
        return _Task(self, samples)

    def give_up(self, sample: SampleTask, bucket: Bucket, error: TaskDiedError) -> Frames:
        if error.at_fault:
            return refuse(sample, bucket, "decoder_crashed", error.detail)
        return postpone(sample, "decoder_lost", error.detail)


class _Task:
    def __init__(self, decoders: Decoders, samples: Sequence[SampleTask]) -> None:
        self._decoders = decoders
        self._frames = self._run(samples)

    def _run(self, samples: Sequence[SampleTask]) -> Iterator[Frames]:
        for sample in samples:
            if sample.sample in self._decoders.deadly:
                raise TaskDiedError(True, "crashed")
            if sample.sample in self._decoders.lost:
                self._decoders.lost.remove(sample.sample)
                raise TaskDiedError(False, "its node died")
            self._decoders.taken.append(sample.sample)
            yield np.full(1, ord(sample.sample), np.uint8)

    def next(self) -> Frames:
        return next(self._frames)


def _names(frames: Iterator[Frames]) -> str:
    return "".join(
        chr(part[0]) if isinstance(part, np.ndarray) else f"({type(part).__name__} {part.reason})" for part in frames
    )


def test_frames_come_in_the_order_of_the_samples() -> None:
    decoders = Decoders()
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=1 << 30)
    names = "".join(chr(ord("A") + i) for i in range(40))
    assert _names(ahead.open(_shard(names))) == names
    assert max(map(len, decoders.submitted)) <= 4


def test_a_crash_costs_one_clip_of_its_task() -> None:
    decoders = Decoders(deadly="c")
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=1 << 30)
    assert _names(ahead.open(_shard("abcdef"))) == "ab(Refusal decoder_crashed)def"
    assert decoders.submitted == ["abcd", "ef", "c", "d"]
    assert decoders.taken.count("a") == 1


def test_a_clip_whose_node_was_lost_is_decoded_elsewhere() -> None:
    decoders = Decoders(lost="b")
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=1 << 30)
    assert _names(ahead.open(_shard("abc"))) == "abc"


@pytest.mark.parametrize("at_fault", [True, False])
def test_a_clip_that_is_lost_again_is_refused_only_if_it_may_be_at_fault(at_fault: bool) -> None:
    decoders = Decoders()

    def submit(samples: Sequence[SampleTask], bucket: Bucket) -> Pending:
        class _Dead:
            def next(self) -> Frames:
                raise TaskDiedError(at_fault, "gone")

        return _Dead()

    (found,) = DecodeAhead(submit, decoders.give_up, max_bytes=1 << 30).open(_shard("a"))
    assert isinstance(found, Refusal if at_fault else Postponed)


def test_what_is_decoded_ahead_is_bounded_over_all_shards_and_goes_in_their_order() -> None:
    decoders = Decoders()
    size = frame_bytes(LARGE)
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=10 * size)
    first, second = ahead.open(_shard("abcdefghijkl", LARGE)), ahead.open(_shard("mnop", LARGE))
    assert len("".join(decoders.submitted)) <= 10
    assert not set("mnop") & set("".join(decoders.submitted))
    assert next(first) is not None
    assert _names(first) == "bcdefghijkl"
    assert set("mnop") <= set("".join(decoders.submitted)), "the next shard's frames are there when this one ends"
    assert _names(second) == "mnop"


def test_one_sample_larger_than_the_bound_is_decoded_all_the_same() -> None:
    decoders = Decoders()
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=1)
    assert _names(ahead.open(_shard("abc", LARGE))) == "abc"


def test_a_shard_whose_last_samples_another_thread_asks_for_meanwhile_is_whole() -> None:
    decoders = Decoders()
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=4 * frame_bytes(LARGE))
    first, second = ahead.open(_shard("abcd", LARGE)), ahead.open(_shard("mnop", LARGE))
    assert next(first) is not None
    assert decoders.submitted == ["abcd"], "what the memory holds"
    submit_next = ahead._submit_next

    def end_first_and_submit(shard: Any) -> None:
        first.close()  # type: ignore[attr-defined]
        submit_next(shard)

    ahead._submit_next = end_first_and_submit  # type: ignore[method-assign]
    assert _names(second) == "mnop"
    assert decoders.submitted == ["abcd", "mnop"]


def test_a_shard_that_is_given_up_frees_its_memory_for_the_next() -> None:
    decoders = Decoders()
    ahead = DecodeAhead(decoders.submit, decoders.give_up, max_bytes=4 * frame_bytes(LARGE))
    first, second = ahead.open(_shard("abcdefgh", LARGE)), ahead.open(_shard("mnop", LARGE))
    assert next(first) is not None
    first.close()  # type: ignore[attr-defined]
    assert "m" in "".join(decoders.submitted)
    assert _names(second) == "mnop"
