"""An exponential moving average of the float32 weights, each rank keeping the part whose master weights it holds."""

import torch
from torch import Tensor

from train.parallel.zero import MasterWeights


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
        self._averages = {name: part.clone() for name, part in masters.parts().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after ``step`` (counted from 0) into the average."""
        current = self._masters.parts()
        names = list(self._averages)
        torch._foreach_lerp_(
            [self._averages[name] for name in names],
            [current[name] for name in names],
            1 - decay_at(step, self._decay),
        )

    def gather(self) -> dict[str, Tensor]:
        """Returns the whole average on the CPU, by parameter, on rank 0; nothing elsewhere. All ranks call it."""
        return self._masters.gather(self._averages)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Continues from a gathered average."""
        for name, part in self._masters.own_parts_of(weights).items():
            self._averages[name].copy_(part)
