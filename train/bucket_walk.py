"""How the slots of the global batch walk the samples of one bucket.

The bucket's clips stand in the order in which they are stored: by shard, then by offset. Every ``run_samples`` of them
are a *run*, a few megabytes of one shard that are fetched by one read (two where a shard ends inside). Of clips that
have several variants a run takes one in each epoch (``train.variants``). An epoch is the runs in a fresh order, each
with its samples in a fresh order; written one after another they are the epoch's *sequence*. Every slot
gets a stretch of it, as many samples as it takes in that epoch: sample number p of the endless bucket goes to slot
``p % batch_size`` in batch ``p // batch_size``, and p // num_samples is its epoch. So an epoch's tail shares a batch
with the next one's beginning, and all of it is arithmetic: no slot needs to know what the others did.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from train.permutation import Permutation, hash_words
from train.variants import ClipGroup, VariantRows

Integers = npt.NDArray[np.int64]

_EPOCHS_KEPT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketRows:
    """Where a bucket's samples lie in the index."""

    first_row: int
    num_samples: int
    """Of an epoch: one of each clip."""
    run_samples: int
    """Samples that are read together, at least 1."""
    groups: tuple[ClipGroup, ...] = ()
    """The clips by their number of variants, in the order of the index; empty where each has one."""

    def __post_init__(self) -> None:
        assert not self.groups or sum(group.num_clips for group in self.groups) == self.num_samples

    @property
    def num_rows(self) -> int:
        """Rows of the bucket; they follow one another in the index."""
        return sum(group.num_clips * group.num_variants for group in self.groups) or self.num_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """A slot's stay at one run: what it takes from there, one sample a batch."""

    epoch: int
    run: int
    """Number of the run in the order of the index."""
    rows: tuple[int, ...]
    """Of the index, in the order in which they are taken."""


class _Epoch:
    """The order of a bucket's runs in one epoch. The last run of the index may be short."""

    def __init__(self, rows: BucketRows, key: int, epoch: int) -> None:
        size = rows.run_samples
        num_runs = -(-rows.num_samples // size)
        self.runs = Permutation(num_runs, int(hash_words(key, epoch)))
        self._size, self._missing = size, num_runs * size - rows.num_samples
        self._short_place = self.runs.place_of(num_runs - 1)

    def locate(self, sequence: Integers) -> tuple[Integers, Integers]:
        """Returns, for places in the sequence, the run's place in the order and the sample's place in the run."""
        behind = sequence >= (self._short_place + 1) * self._size - self._missing
        places, inside = np.divmod(sequence + behind * self._missing, self._size)
        return places, inside


class BucketWalk:
    """One bucket's batches, by their number.

    Args:
        rows: Where its samples lie.
        batch_size: Slots of the global batch.
        key: Decides the order.
    """

    def __init__(self, rows: BucketRows, *, batch_size: int, key: int) -> None:
        assert rows.num_samples > 0
        assert 0 < rows.run_samples < 1 << 16
        assert batch_size > 0
        self.rows = rows
        self._batch_size, self._key = batch_size, key
        self._variants = VariantRows(rows.groups or (ClipGroup(num_clips=rows.num_samples, num_variants=1),))
        self._epochs: dict[int, _Epoch] = {}
        width = min(rows.run_samples, rows.num_samples)
        self._held = np.full((batch_size, 2), -1, dtype=np.int64)  # the epoch and run whose order is kept, by slot
        self._orders = np.zeros((batch_size, width), dtype=np.uint16)

    def take(self, batch: int, slots: slice) -> tuple[Integers, Integers]:
        """Returns the rows that ``slots`` take in one batch, and their epochs."""
        numbers = np.arange(self._batch_size, dtype=np.int64)[slots]
        epochs, sequence = self._locate(batch, numbers)
        runs, inside = self._runs(epochs, sequence)
        self._hold(numbers, epochs, runs)
        return self._rows(runs, self._orders[numbers, inside], epochs), epochs

    def runs(self, batch: int, slots: slice) -> tuple[Integers, Integers]:
        """Returns the runs at which ``slots`` are in one batch, and the epochs."""
        numbers = np.arange(self._batch_size, dtype=np.int64)[slots]
        epochs, sequence = self._locate(batch, numbers)
        return self._runs(epochs, sequence)[0], epochs

    def visit(self, batch: int, slot: int) -> Visit:
        """Returns a slot's stay at a run, from ``batch`` on."""
        numbers = np.array([slot], dtype=np.int64)
        epochs, sequence = self._locate(batch, numbers)
        epoch, first = int(epochs[0]), int(sequence[0])
        places, inside = self._epoch(epoch).locate(sequence)
        run = int(self._epoch(epoch).runs.at(places)[0])
        self._hold(numbers, epochs, np.array([run]))
        size = self._run_size(run)
        end = int(self._stretch_starts(epochs, numbers + 1)[0])
        stay = min(size - int(inside[0]), end - first)
        rows = self._rows_of_run(run, epoch, self._orders[slot, int(inside[0]) : int(inside[0]) + stay])
        return Visit(epoch=epoch, run=run, rows=tuple(rows.tolist()))

    def run_rows(self, run: int, epoch: int) -> Integers:
        """Returns all rows that a run takes in an epoch, in the order of its clips."""
        return self._rows_of_run(run, epoch, np.arange(self._run_size(run)))

    def _rows_of_run(self, run: int, epoch: int, within: npt.NDArray[Any]) -> Integers:
        return self._rows(np.full(len(within), run), within, np.full(len(within), epoch))

    def _rows(self, runs: Integers, within: npt.NDArray[Any], epochs: Integers) -> Integers:
        """Returns the rows of clips, by their places in runs, each in its epoch."""
        clips = runs * self.rows.run_samples + within.astype(np.int64)
        return self.rows.first_row + self._variants.rows(self._key, clips, epochs, runs)

    def _locate(self, batch: int, slots: Integers) -> tuple[Integers, Integers]:
        """Returns the epochs of the slots' samples, and their places in those epochs' sequences."""
        total, size = self.rows.num_samples, self._batch_size
        epochs = (batch * size + slots) // total
        first_batches = -((slots - epochs * total) // size)  # the first batch whose sample lies in the epoch
        return epochs, self._stretch_starts(epochs, slots) + batch - np.maximum(first_batches, 0)

    def _stretch_starts(self, epochs: Integers, slots: Integers) -> Integers:
        """Returns where stretches of an epoch's sequence begin: how many samples the slots before them take."""

        def before(ends: Integers) -> Integers:
            whole, rest = np.divmod(ends, self._batch_size)
            return whole * slots + np.minimum(rest, slots)

        return before((epochs + 1) * self.rows.num_samples) - before(epochs * self.rows.num_samples)

    def _runs(self, epochs: Integers, sequence: Integers) -> tuple[Integers, Integers]:
        runs, inside = np.empty_like(sequence), np.empty_like(sequence)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            places, inside[here] = self._epoch(epoch).locate(sequence[here])
            runs[here] = self._epoch(epoch).runs.at(places)
        return runs, inside

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Epoch(self.rows, self._key, epoch)
        return self._epochs[epoch]

    def _run_size(self, run: int) -> int:
        return min(self.rows.run_samples, self.rows.num_samples - run * self.rows.run_samples)

    def _hold(self, slots: Integers, epochs: Integers, runs: Integers) -> None:
        """Makes the orders inside the slots' runs, where they are not the ones at hand."""
        wanted = np.stack([epochs, runs], axis=1)
        changed = (self._held[slots] != wanted).any(axis=1)
        if not changed.any():
            return
        places = np.arange(self._orders.shape[1])
        hashed = hash_words(self._key, epochs[changed, None], runs[changed, None] + 1, places[None])
        sizes = np.minimum(self.rows.run_samples, self.rows.num_samples - runs[changed] * self.rows.run_samples)
        hashed = np.where(places[None] < sizes[:, None], hashed, np.uint64(0xFFFFFFFFFFFFFFFF))
        self._orders[slots[changed]] = np.argsort(hashed, axis=1, kind="stable")
        self._held[slots[changed]] = wanted[changed]
