"""Decoding ahead of an encoder: which clips are being decoded now, bounded by the bytes of their frames. No Ray here.

The frames of all shards that a worker has at hand are asked for in the order in which they will be encoded, so that the
next shard's first clips are ready when the last clip of this one is taken. A task decodes several clips; after a crash
each of them is tried by itself, so that a crash costs one clip.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared.clips.decode import Frames
from shared.clips.plan import SampleTask, ShardTask
from shared.spec import Bucket

_TASK_BYTES = 64 << 20
_TASK_CLIPS = 4
"""What one decoding task brings, at most: few clips, so that the CPUs have enough tasks; a task costs 2 ms to start."""


class TaskDiedError(Exception):
    """A decoding task ended without an answer.

    Args:
        at_fault: Whether its clip may have caused that; not so where a node was lost or memory ran out.
        detail: What happened.
        timed_out: Whether its clip took too long.
    """

    def __init__(self, at_fault: bool, detail: str, *, timed_out: bool = False) -> None:
        super().__init__(detail)
        self.at_fault, self.detail, self.timed_out = at_fault, detail, timed_out


class Pending(Protocol):
    """A decoding task that was submitted."""

    def next(self) -> Frames:
        """Returns the frames of its next sample, in order; raises :class:`TaskDiedError`."""


Submit = Callable[[Sequence[SampleTask], Bucket], Pending]


@dataclass(eq=False, kw_only=True, slots=True)
class _Batch:
    """Samples of one decoding task."""

    pending: Pending
    samples: deque[SampleTask]
    """Those that it has not brought yet."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Shard:
    task: ShardTask
    num_submitted: int = 0
    batches: deque[_Batch] = field(default_factory=deque)


class DecodeAhead:
    """What one encoder has being decoded, over all shards that it was given.

    Args:
        submit: Starts a task that decodes samples of one bucket.
        give_up: Says what becomes of a sample whose task died, tried by itself.
        max_bytes: Of frames that are decoded or being decoded; one task may exceed it by itself.
    """

    def __init__(self, submit: Submit, give_up: Callable[[SampleTask, Bucket, TaskDiedError], Frames], max_bytes: int):
        self._submit, self._give_up, self._max_bytes = submit, give_up, max_bytes
        self._lock = threading.Lock()
        self._shards: deque[_Shard] = deque()
        """With samples that are not submitted yet, in the order of encoding."""
        self._bytes = 0

    def open(self, task: ShardTask) -> Iterator[Frames]:
        """Starts decoding a shard, after those opened before, and returns the frames of its samples, in order."""
        shard = _Shard(task=task)
        with self._lock:
            self._shards.append(shard)
        self._pump()
        return self._frames(shard)

    def _frames(self, shard: _Shard) -> Iterator[Frames]:
        bucket = shard.task.bucket
        sample_bytes = frame_bytes(bucket)
        try:
            for sample in shard.task.samples:
                self._pump()
                frames = self._next(shard, sample)
                self._release(sample_bytes)
                yield frames
                del frames
        finally:  # also if nobody takes the rest
            with self._lock:
                if shard in self._shards:
                    self._shards.remove(shard)
            self._release(sample_bytes * sum(len(batch.samples) for batch in shard.batches))

    def _next(self, shard: _Shard, sample: SampleTask) -> Frames:
        while not shard.batches:  # another shard's frames fill the memory; the encoder takes them first
            self._submit_next(shard)
        batch = shard.batches[0]
        try:
            frames = batch.pending.next()
        except TaskDiedError as error:
            return self._after_death(shard, sample, error)
        batch.samples.popleft()
        if not batch.samples:
            shard.batches.popleft()
        return frames

    def _after_death(self, shard: _Shard, sample: SampleTask, error: TaskDiedError) -> Frames:
        """Returns what becomes of the sample at which a task died, once it and those behind it are tried alone."""
        bucket = shard.task.bucket
        batch = shard.batches.popleft()
        again = None if len(batch.samples) == 1 and error.at_fault else self._submit([sample], bucket)
        alone = [
            _Batch(pending=self._submit([other], bucket), samples=deque([other])) for other in list(batch.samples)[1:]
        ]
        shard.batches.extendleft(reversed(alone))
        if again is not None:
            try:
                return again.next()
            except TaskDiedError as second:
                error = second
        return self._give_up(sample, bucket, error)

    def _pump(self) -> None:
        """Submits what the memory holds."""
        with self._lock:
            while self._shards:
                shard = self._shards[0]
                batch_bytes = _batch_size(shard) * frame_bytes(shard.task.bucket)
                if self._bytes and self._bytes + batch_bytes > self._max_bytes:
                    return
                self._submit_batch(shard)

    def _submit_next(self, shard: _Shard) -> None:
        with self._lock:
            if not shard.batches:  # else a thread that released memory did it meanwhile
                self._submit_batch(shard)

    def _submit_batch(self, shard: _Shard) -> None:
        """Submits a shard's next samples; the lock is held."""
        size = _batch_size(shard)
        samples = shard.task.samples[shard.num_submitted : shard.num_submitted + size]
        shard.num_submitted += len(samples)
        self._bytes += len(samples) * frame_bytes(shard.task.bucket)
        if shard.num_submitted == len(shard.task.samples):
            self._shards.remove(shard)
        shard.batches.append(_Batch(pending=self._submit(samples, shard.task.bucket), samples=deque(samples)))

    def _release(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes -= num_bytes
        self._pump()


def frame_bytes(bucket: Bucket) -> int:
    """Returns the bytes of a sample's frames, uint8 RGB."""
    return bucket.num_frames * bucket.height * bucket.width * 3


def _batch_size(shard: _Shard) -> int:
    most = max(1, min(_TASK_CLIPS, _TASK_BYTES // frame_bytes(shard.task.bucket)))
    return min(most, len(shard.task.samples) - shard.num_submitted)
