"""One step of training: the loss of a batch, its gradients, and the optimiser's step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.conditions import draw_frame_mask
from train.data import Batch
from train.diffusion.frame_masks import MaskStrategy
from train.diffusion.objective import Objective
from train.diffusion.terms import LossTerms
from train.loss import batch_loss, loss_of
from train.model.transformer import DiffusionTransformer
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.master_weights import Following
from train.parallel.verdict import Verdict
from train.parallel.zero import take_step
from train.pass_graphs import PassGraphs, PassInputs, Recorder


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
        recorder: Where forward and backward passes are to run as graphs, what records them: only where gradients are
            :class:`train.parallel.lean_zero.LeanZero`'s. None: they are launched operation by operation.
    """

    def __init__(
        self,
        engine: Any,
        model: DiffusionTransformer,
        objective: Objective,
        *,
        accumulation: int = 1,
        mask_ratios: Mapping[MaskStrategy, float] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._engine, self._model, self._objective = engine, model, objective
        self._accumulation, self._mask_ratios = accumulation, mask_ratios
        self._wants_size = getattr(model, "wants_size", False)
        self._graphs = None if recorder is None else PassGraphs(self._fixed_pass, engine.lean_zero, recorder)

    def loss(self, batch: Batch) -> LossTerms:
        """Returns the loss of each sample of a batch on the model's device."""
        mask = self._frame_mask(batch)
        return batch_loss(self._engine, self._objective, batch, wants_size=self._wants_size, frame_mask=mask)

    def give_memory_back(self) -> None:
        """Gives up graphs, which hold the memory of a pass between steps too; the next steps record them again."""
        if self._graphs is not None:
            self._graphs.forget()

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
                parts.append(self._pass(part))
            if index + 1 < self._accumulation:
                self._engine.step()  # counts the part; the optimiser's step comes after the last
        norm, verdict = take_step(self._engine, self._model, following)
        return StepResult(terms=_joined(parts), grad_norm=norm, verdict=verdict)

    def _frame_mask(self, batch: Batch) -> Tensor | None:
        return None if self._mask_ratios is None else draw_frame_mask(batch, self._mask_ratios)

    def _pass(self, batch: Batch) -> LossTerms:
        """Returns the loss of each sample of a batch, after the backward pass."""
        if self._graphs is not None:
            length = self._model.config.model_max_length
            return self._graphs.run(PassInputs.of_batch(batch, self._frame_mask(batch), length))
        return self._backward(self.loss(batch))

    def _fixed_pass(self, inputs: PassInputs) -> LossTerms:
        """The same of inputs that hold all that the host decides: nothing here asks it."""
        drawn = inputs.x0, inputs.u, inputs.noise
        terms = loss_of(self._engine, self._objective, inputs.conditions, *drawn, wants_size=self._wants_size)
        return self._backward(terms)

    def _backward(self, terms: LossTerms) -> LossTerms:
        self._engine.backward(_poisoned_unless_finite(terms.loss.mean()))
        return _detached(terms)


def _poisoned_unless_finite(loss: Tensor) -> Tensor:
    """Returns the loss so that its gradient is no number unless it is finite.

    An infinite loss may have a finite gradient. This way the gradient's norm tells all ranks, without waiting for one.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _detached(terms: LossTerms) -> LossTerms:
    return LossTerms(loss=terms.loss.detach(), parts={name: values.detach() for name, values in terms.parts.items()})


def _joined(terms: list[LossTerms]) -> LossTerms:
    """Returns the terms of all parts, in memory of their own: the next pass may write where these lie."""
    return LossTerms(
        loss=torch.cat([each.loss for each in terms]),
        parts={name: torch.cat([each.parts[name] for each in terms]) for name in terms[0].parts},
    )
