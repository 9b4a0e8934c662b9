"""Which samples every step trains on: a pure function of the index, the seed and the step.

Each bucket is an endless stream of batches (``train.bucket_walk``). An epoch is the batches that end inside it, over
all buckets: batch j of n of a bucket is taken at a random time between j/n and (j+1)/n of the epoch, so the buckets are
mixed evenly, each in its own order. How many batches come before an epoch, or before a time, has a closed form, so any
step is found without walking to it. Neither ranks nor workers play a part: a rank has some of the global batch's slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import InputError
from shared.spec import Bucket
from shared.wording import counted
from train.bucket_walk import BucketRows, BucketWalk, Integers
from train.permutation import hash_words, uniform

_TIMES, _WALKS = 1, 2
"""What the seed is mixed with, so that one random choice says nothing of another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """Which samples some slots of a step's global batch take."""

    bucket: Bucket
    number: int
    """Of the batch among its bucket's."""
    rows: Integers
    """(slots,) rows of the index."""
    epochs: Integers
    """(slots,) the pass over its bucket in which each sample is taken."""


class BatchPlan:
    """The batches of a run, by step.

    Args:
        buckets: Where the samples of each bucket lie in the index.
        batch_sizes: Samples of a global batch, by bucket.
        seed: Not negative.
    """

    def __init__(self, buckets: Mapping[Bucket, BucketRows], *, batch_sizes: Mapping[Bucket, int], seed: int) -> None:
        assert buckets
        assert all(rows.num_samples for rows in buckets.values())
        self._buckets = sorted(buckets)
        self._num_samples = [buckets[bucket].num_samples for bucket in self._buckets]
        self._batch_sizes = [batch_sizes[bucket] for bucket in self._buckets]
        self._seed = seed
        self._walks = [
            BucketWalk(
                buckets[b],
                batch_size=batch_sizes[b],
                key=int(hash_words(seed, _WALKS, b.num_frames, b.height, b.width)),
            )
            for b in self._buckets
        ]

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets, in order."""
        return list(self._buckets)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self._num_samples)

    def batch_size(self, bucket: Bucket) -> int:
        """Returns the samples of a global batch of a bucket."""
        return self._batch_sizes[self._buckets.index(bucket)]

    def first_step(self, epoch: int) -> int:
        """Returns the number of batches before an epoch."""
        return sum(self._batches_before(epoch))

    def epoch_of(self, step: int) -> int:
        """Returns the epoch to which a step belongs."""
        rate = sum(n / b for n, b in zip(self._num_samples, self._batch_sizes, strict=True))
        epoch = int(step / rate)
        while self.first_step(epoch) > step:
            epoch -= 1
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def locate(self, step: int) -> tuple[Bucket, int]:
        """Returns the bucket of a step, counted from 0, and the number of the batch among the bucket's."""
        epoch = self.epoch_of(step)
        firsts = self._batches_before(epoch)
        counts = np.subtract(self._batches_before(epoch + 1), firsts)
        index, batch = self._event(epoch, counts, step - sum(firsts))
        return self._buckets[index], firsts[index] + batch

    def batch(self, step: int, slots: slice = slice(None)) -> PlannedBatch:
        """Returns what ``slots``, by default all, take in ``step``."""
        bucket, number = self.locate(step)
        rows, epochs = self.walk(bucket).take(number, slots)
        return PlannedBatch(bucket=bucket, number=number, rows=rows, epochs=epochs)

    def walk(self, bucket: Bucket) -> BucketWalk:
        """Returns how the slots walk one bucket."""
        return self._walks[self._buckets.index(bucket)]

    def _batches_before(self, epoch: int) -> list[int]:
        return [n * epoch // b for n, b in zip(self._num_samples, self._batch_sizes, strict=True)]

    def _event(self, epoch: int, counts: Integers, place: int) -> tuple[int, int]:
        """Returns the bucket (its index) and batch at ``place`` in an epoch's order of all batches.

        Before the time t a bucket has between n * t - 1 and n * t + 1 batches, so the time at which ``place`` batches
        have passed is known to within a few batches; those are put in order.
        """
        if len(counts) == 1:
            return 0, place
        total = int(counts.sum())
        low = max(0.0, (place - len(counts) - 1) / total)
        high = min(1.0, (place + len(counts) + 2) / total)
        first = np.floor(low * counts).astype(np.int64)  # none of these is taken before `low`, all below them are
        last = np.minimum(counts, np.ceil(high * counts).astype(np.int64) + 1)
        events = []
        for index, (begin, end, count) in enumerate(zip(first, last, counts, strict=True)):
            batches = np.arange(begin, end)
            times = (batches + uniform(hash_words(self._seed, _TIMES, epoch, index, batches))) / max(count, 1)
            events += [(time, index, int(batch)) for time, batch in zip(times.tolist(), batches, strict=True)]
        events.sort()
        _, index, batch = events[place - int(first.sum())]
        return index, batch


def rank_slots(batch_size: int, rank: int, world_size: int, *, name: str = "batch_size") -> slice:
    """Returns a rank's slots of the global batch.

    Args:
        batch_size: Samples of a global batch.
        rank: From 0.
        world_size: Ranks.
        name: What the user calls ``batch_size``.

    Raises:
        InputError: if the ranks do not divide the batch.
    """
    if batch_size % world_size:
        low = batch_size // world_size * world_size
        choices = " or ".join(str(size) for size in (low, low + world_size) if size)
        raise InputError(f"{name}={batch_size} is not divisible by {world_size} ranks: use {choices}")
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def batch_sizes_by_tokens(tokens: Mapping[Bucket, int], *, batch_tokens: int, multiple: int) -> dict[Bucket, int]:
    """Returns each bucket's batch size: the largest multiple of ``multiple`` within ``batch_tokens``.

    The number of ranks plays no part, or the plan would change with it: choose a multiple of it that stays good.

    Args:
        tokens: Tokens of one sample, by bucket.
        batch_tokens: Most tokens of a global batch.
        multiple: At least 1.

    Raises:
        InputError: if ``multiple`` samples of a bucket are too many tokens.
    """
    sizes = {}
    for bucket, each in tokens.items():
        sizes[bucket] = batch_tokens // each // multiple * multiple
        if not sizes[bucket]:
            raise InputError(
                f"bucket {bucket}: {counted(multiple, 'sample')} of {each} tokens, more than batch_tokens="
                f"{batch_tokens}: use at least {multiple * each}, or a smaller --batch-multiple"
            )
    return sizes


def select_buckets(held: Mapping[Bucket, BucketRows], wanted: Sequence[str]) -> dict[Bucket, BucketRows]:
    """Returns the buckets named in ``wanted``; all of them if it is empty.

    Raises:
        InputError: for a bucket that the cache does not hold.
    """
    if not wanted:
        return dict(held)
    chosen = {}
    for name in wanted:
        bucket = Bucket.parse(name)
        if bucket not in held:
            raise InputError(f"bucket {name}: the cache holds {', '.join(str(b) for b in sorted(held))}")
        chosen[bucket] = held[bucket]
    return chosen
