"""Which samples every step trains on: a pure function of the samples, the seed and the step.

Each bucket is an endless stream: its samples in one order after another, a fresh order each epoch. A batch is the next
``batch_size`` samples of one bucket's stream, so what an epoch leaves over begins the next one and nothing is dropped.
An epoch is the batches that end inside it, over all buckets, in a shuffled order. How many batches come before an epoch
has a closed form, so any step is found without walking to it, and neither ranks nor workers play a part.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import InputError
from shared.spec import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """The global batch of one step."""

    bucket: Bucket
    rows: np.ndarray
    """(B,) rows of the index."""
    epochs: np.ndarray
    """(B,) the pass over its bucket in which each sample is taken."""


class BatchPlan:
    """The batches of a run, by step.

    Args:
        rows_by_bucket: The rows of the index, bucket by bucket.
        batch_size: Samples of a global batch.
        seed: Not negative.
    """

    def __init__(self, rows_by_bucket: Mapping[Bucket, np.ndarray], *, batch_size: int, seed: int) -> None:
        assert batch_size >= 1, batch_size
        assert any(len(rows) for rows in rows_by_bucket.values())
        self._buckets = sorted(bucket for bucket, rows in rows_by_bucket.items() if len(rows))
        self._rows = [rows_by_bucket[bucket] for bucket in self._buckets]
        self._batch_size, self._seed = batch_size, seed
        self._orders: dict[tuple[int, ...], np.ndarray] = {}

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(len(rows) for rows in self._rows)

    def first_step(self, epoch: int) -> int:
        """Returns the number of batches before an epoch."""
        return sum(len(rows) * epoch // self._batch_size for rows in self._rows)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch to which a step belongs."""
        beyond = (step + len(self._rows) + 1) * self._batch_size // self.num_samples + 2
        return bisect_right(range(beyond), step, key=self.first_step) - 1

    def batch(self, step: int) -> PlannedBatch:
        """Returns the global batch of ``step``, counted from 0."""
        epoch = self.epoch_of(step)
        first_batches = [len(rows) * epoch // self._batch_size for rows in self._rows]
        ends = [len(rows) * (epoch + 1) // self._batch_size for rows in self._rows]
        counts = np.subtract(ends, first_batches)
        order = self._order((epoch,), int(counts.sum()))
        place = order[step - self.first_step(epoch)]
        index = int(np.searchsorted(counts.cumsum(), place, side="right"))
        batch = first_batches[index] + int(place - counts[:index].sum())
        return self._stream(index, batch)

    def _stream(self, index: int, batch: int) -> PlannedBatch:
        """Returns one batch of one bucket's stream."""
        bucket, rows = self._buckets[index], self._rows[index]
        positions = np.arange(batch * self._batch_size, (batch + 1) * self._batch_size)
        epochs, places = np.divmod(positions, len(rows))
        taken = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            key = (int(epoch), bucket.num_frames, bucket.height, bucket.width)
            here = epochs == epoch
            taken[here] = rows[self._order(key, len(rows))[places[here]]]
        return PlannedBatch(bucket=bucket, rows=taken, epochs=epochs)

    def _order(self, key: tuple[int, ...], length: int) -> np.ndarray:
        """Returns a permutation that is the same for the same seed and key; ``key[0]`` is the epoch.

        Those of the latest two epochs of a bucket are kept, as one batch may reach over the border.
        """
        if key not in self._orders:
            stale = [k for k in self._orders if k[1:] == key[1:] and abs(k[0] - key[0]) > 1]
            for old in stale:
                del self._orders[old]
            self._orders[key] = np.random.default_rng([self._seed, *key]).permutation(length)
        return self._orders[key]


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Returns a rank's part of the global batch.

    Raises:
        InputError: if the ranks do not divide the batch.
    """
    if batch_size % world_size:
        low = batch_size // world_size * world_size
        choices = " or ".join(str(size) for size in (low, low + world_size) if size)
        raise InputError(f"batch_size={batch_size} is not divisible by {world_size} ranks: use {choices}")
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def select_buckets(rows_by_bucket: Mapping[Bucket, np.ndarray], wanted: Sequence[str]) -> dict[Bucket, np.ndarray]:
    """Returns the buckets named in ``wanted``; all of them if it is empty.

    Raises:
        InputError: for a bucket that the cache does not hold.
    """
    if not wanted:
        return dict(rows_by_bucket)
    chosen = {}
    for name in wanted:
        bucket = Bucket.parse(name)
        if bucket not in rows_by_bucket:
            held = ", ".join(str(b) for b in sorted(rows_by_bucket))
            raise InputError(f"bucket {name}: the cache holds {held}")
        chosen[bucket] = rows_by_bucket[bucket]
    return chosen
