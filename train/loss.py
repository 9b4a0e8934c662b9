"""The loss of samples: the model with their conditions, under an objective."""

from collections.abc import Callable

from torch import Tensor

from train.conditions import Conditions, denoiser
from train.data import Batch
from train.diffusion.objective import Objective
from train.diffusion.terms import LossTerms


def batch_loss(
    model: Callable[..., Tensor],
    objective: Objective,
    batch: Batch,
    *,
    wants_size: bool,
    frame_mask: Tensor | None = None,
    x0: Tensor | None = None,
    u: Tensor | None = None,
    noise: Tensor | None = None,
) -> LossTerms:
    """Returns the loss of each sample of a batch on the model's device.

    Args:
        model: The model, or the engine around it.
        objective: What it is trained for.
        batch: On the model's device.
        wants_size: The model's attribute.
        frame_mask: (B, T) False at frames that are given; None: all are made.
        x0: Other latents (B, C, T, H, W) than the batch's own, float32.
        u: Other draws (B,) than the batch's own, float64.
        noise: Other noise (B, C, T, H, W) than the batch's own, float32.
    """
    return loss_of(
        model,
        objective,
        Conditions.of_batch(batch, frame_mask),
        batch.clean_latents() if x0 is None else x0,
        batch.u if u is None else u,
        batch.noise() if noise is None else noise,
        wants_size=wants_size,
    )


def loss_of(
    model: Callable[..., Tensor],
    objective: Objective,
    conditions: Conditions,
    x0: Tensor,
    u: Tensor,
    noise: Tensor,
    *,
    wants_size: bool,
) -> LossTerms:
    """Returns the loss of each sample, of what :func:`batch_loss` takes from a batch; all is on the model's device."""
    denoise = denoiser(model, conditions, wants_size=wants_size)
    return objective.loss(denoise, x0, u, noise, frame_mask=conditions.frame_mask)
