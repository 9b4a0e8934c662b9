"""Which window of a clip an epoch takes, mirrored or not: found without a table.

The samples of one clip in one bucket are its *variants*. In the index a bucket's clips stand by their number of
variants, and of those that have equally many come first all of variant 0, then all of variant 1, and so on, each time
in the same order of the clips. So the row of any variant of any clip is arithmetic, and clips that follow each other
have, in each variant, rows that do. ``train.clip_order`` makes that order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.permutation import hash_words

Integers = npt.NDArray[np.int64]

_CHOICE = 0x56415249


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGroup:
    """Clips of a bucket that have equally many variants."""

    num_clips: int
    num_variants: int


class VariantRows:
    """The rows of a bucket's clips.

    Args:
        groups: All clips of the bucket, in the order of the index.
    """

    def __init__(self, groups: Sequence[ClipGroup]) -> None:
        clips = np.array([group.num_clips for group in groups], np.int64)
        variants = np.array([group.num_variants for group in groups], np.int64)
        assert (clips > 0).all()
        assert (variants > 0).all()
        self._ends = clips.cumsum()
        self._first_clips = self._ends - clips
        self._first_rows = (clips * variants).cumsum() - clips * variants
        self._clips, self._variants = clips, variants
        self._one_each = bool((variants == 1).all())

    def rows(self, key: int, clips: Integers, epochs: Integers, runs: Integers) -> Integers:
        """Returns the rows (N,) that clips take, counted from the bucket's first.

        Args:
            key: Decides the choice.
            clips: (N,) places of clips in the bucket.
            epochs: (N,) in which they are taken.
            runs: (N,) the clips' runs: those of a run that have equally many variants take the same one.
        """
        if self._one_each:
            return clips
        group = np.searchsorted(self._ends, clips, side="right")
        variants = choose_variants(key, epochs, runs, self._variants[group])
        return self._first_rows[group] + variants * self._clips[group] + clips - self._first_clips[group]


def choose_variants(key: int, epochs: Integers, runs: Integers, num_variants: Integers) -> Integers:
    """Returns which of its variants (N,) each takes: in as many epochs as there are variants each of them once, then
    again in another order.

    Args:
        key: Decides the choice.
        epochs: (N,) from 0.
        runs: (N,) that choose by themselves.
        num_variants: (N,) at least 1.
    """
    rounds, turns = np.divmod(epochs, num_variants)
    places = np.arange(num_variants.max(initial=1))
    hashed = hash_words(key, _CHOICE, rounds[:, None], runs[:, None], num_variants[:, None], places[None])
    hashed = np.where(places[None] < num_variants[:, None], hashed, np.uint64(0xFFFFFFFFFFFFFFFF))
    orders = np.argsort(hashed, axis=1, kind="stable")
    chosen: Integers = orders[np.arange(len(turns)), turns]
    return chosen
