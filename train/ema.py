"""An exponential moving average of the float32 weights, each rank keeping the part whose master weights it holds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from train.parallel.master_weights import Following, MasterWeights


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

    def following(self, step: int) -> Following:
        """Returns how the average is to follow ``step`` (counted from 0); what takes the step has it follow."""
        share = 1 - decay_at(step, self._decay)
        return Following(averages=self._flats, weights=self._masters.flats(), share=share)

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
