"""One step of training: the loss of a batch, its gradients, and the optimiser's step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.conditions import draw_frame_mask
from train.data import Batch
from train.diffusion.frame_masks import MaskStrategy
from train.diffusion.objective import Objective
from train.diffusion.terms import LossTerms
from train.loss import batch_loss
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.master_weights import Following
from train.parallel.verdict import Verdict
from train.parallel.zero import take_step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step came to."""

    terms: LossTerms
    """Of this rank's samples; without a graph."""
    grad_norm: Tensor
    """Before clipping, over all ranks."""
    verdict: Verdict
    """Whether the weights took the step; the same on all ranks. They do not where anything was no finite number."""

    @property
    def applied(self) -> bool:
        """The verdict, for which the host may have to wait."""
        return self.verdict.wait()


class TrainingStep:
    """Takes steps with a model in DeepSpeed's engine.

    Args:
        engine: DeepSpeed's.
        model: The module inside it.
        objective: What it is trained for.
        accumulation: Parts in which a batch is computed.
        mask_ratios: How often frames are given rather than made, and which; None: never.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        objective: Objective,
        *,
        accumulation: int = 1,
        mask_ratios: Mapping[MaskStrategy, float] | None = None,
    ) -> None:
        self._engine, self._model, self._objective = engine, model, objective
        self._accumulation, self._mask_ratios = accumulation, mask_ratios

    def loss(self, batch: Batch) -> LossTerms:
        """Returns the loss of each sample of a batch on the model's device."""
        frame_mask = None if self._mask_ratios is None else draw_frame_mask(batch, self._mask_ratios)
        wants_size = getattr(self._model, "wants_size", False)
        return batch_loss(self._engine, self._objective, batch, wants_size=wants_size, frame_mask=frame_mask)

    def take(self, batch: Batch, lr: float, following: Following | None = None) -> StepResult:
        """Takes one step, unless its loss or gradient is no finite number on any rank. All ranks call it.

        Args:
            batch: This rank's, on its device.
            lr: The learning rate.
            following: An average that follows the step if it is taken.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        parts = []
        for index, part in enumerate(batch.split(self._accumulation)):
            with bfloat16_products(batch.latents.device):
                terms = self.loss(part)
                self._engine.backward(_poisoned_unless_finite(terms.loss.mean()))
            if index + 1 < self._accumulation:
                self._engine.step()  # counts the part; the optimiser's step comes after the last
            parts.append(terms)
        norm, verdict = take_step(self._engine, self._model, following)
        return StepResult(terms=_joined(parts), grad_norm=norm, verdict=verdict)


def _poisoned_unless_finite(loss: Tensor) -> Tensor:
    """Returns the loss so that its gradient is no number unless it is finite.

    An infinite loss may have a finite gradient. This way the gradient's norm tells all ranks, without waiting for one.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _joined(terms: list[LossTerms]) -> LossTerms:
    return LossTerms(
        loss=torch.cat([each.loss.detach() for each in terms]),
        parts={name: torch.cat([each.parts[name].detach() for each in terms]) for name in terms[0].parts},
    )
