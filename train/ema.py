"""An exponential moving average of the float32 weights, each rank keeping the part whose master weights it holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from train.ops.moving_average import follow
from train.parallel.master_weights import MasterWeights
from train.parallel.verdict import Verdict


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of one update: less in the first steps, so that the initial weights are soon forgotten.

    Args:
        step: Optimiser steps taken before this one.
        decay: The limit, reached after about ``10 / (1 - decay)`` steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The moving average of one rank's master weights.

    Args:
        masters: This rank's weights; the average starts at them.
        decay: The share of the old average that a step keeps.
    """

    def __init__(self, masters: MasterWeights, decay: float) -> None:
        self._masters, self._decay = masters, decay
        self._flats = [flat.clone() for flat in masters.flats()]
        self._averages = masters.parts_in(self._flats)

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """This rank's part of the average, flat, in float32, by parameter."""
        return self._averages

    @torch.no_grad()
    def update(self, step: int, verdict: Verdict) -> None:
        """Takes the weights after ``step`` (counted from 0) into the average, if the step was taken.

        Where the host does not know that yet, it does not wait: the device leaves out what is to be left out.
        """
        share, current = 1 - decay_at(step, self._decay), self._masters.flats()
        if verdict.known is None:
            for average, values in zip(self._flats, current, strict=True):
                follow(average, values, share, verdict.taken)
        elif verdict.known and self._flats:
            torch._foreach_lerp_(self._flats, current, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lets the model compute with the average inside the block, as for samples. All ranks enter it."""
        masters = self._masters.parts()
        kept = {name: part.clone() for name, part in masters.items()}
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, parts: Mapping[str, Tensor]) -> None:
        """Puts values into masters and model: at stage 0 in float32 they are the same."""
        for name, master in self._masters.parts().items():
            master.copy_(parts[name])
        self._masters.put_into_model(parts)
