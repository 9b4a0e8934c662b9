"""One step of training: the loss of a batch, its gradients, and the optimiser's step."""

from typing import Any

from torch import Tensor, nn

from train.data import Batch
from train.diffusion.objective import Objective
from train.diffusion.terms import LossTerms
from train.ops.cpu_bfloat16 import bfloat16_products
from train.parallel.zero import take_step


class TrainingStep:
    """Takes steps with a model in DeepSpeed's engine.

    Args:
        engine: DeepSpeed's.
        model: The module inside it.
        objective: What it is trained for.
    """

    def __init__(self, engine: Any, model: nn.Module, objective: Objective) -> None:
        self._engine, self._model, self._objective = engine, model, objective

    def loss(self, batch: Batch) -> LossTerms:
        """Returns the loss of each sample of a batch on the model's device."""

        def denoise(x: Tensor, timestep: Tensor) -> Tensor:
            prediction: Tensor = self._engine(x, timestep, batch.captions, batch.mask, drop_caption=batch.drop_caption)
            return prediction

        return self._objective.loss(denoise, batch.clean_latents(), batch.u, batch.noise())

    def take(self, batch: Batch, lr: float) -> tuple[LossTerms, Tensor]:
        """Takes one step, and returns the losses and the gradient's norm before clipping. All ranks call it.

        Args:
            batch: This rank's, on its device.
            lr: The learning rate.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        with bfloat16_products(batch.latents.device):
            terms = self.loss(batch)
            self._engine.backward(terms.loss.mean())
        return terms, take_step(self._engine, self._model)
