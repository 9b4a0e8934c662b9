# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""AdamW over flat tensors in one pass: gradient, float32 weights, moments, their average, and what the model reads.

On a GPU it is one Triton kernel (``adamw_kernels``); elsewhere, and as what the kernel is tested against, plain
PyTorch. Nothing of it is known to the host: whether the step is taken at all, how many were taken, and what follows
from both are on the device, so that a step can be launched before the one ahead of it has run.

Source: Loshchilov and Hutter, arXiv 1711.05101, as ``torch.optim.AdamW`` computes it.

Letters: N values of a piece of the weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_LEAST_NORM = 1e-6
"""Added to a norm before it divides, as DeepSpeed and PyTorch do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWSettings:
    """What a step is told by the host."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def step_factors(
    norm: Float[Tensor, ""],
    steps: Float[Tensor, ""],
    settings: AdamWSettings,
    *,
    max_norm: float,
    num_summed: int,
) -> Float[Tensor, " 4"]:
    """Counts a step, if the gradient's norm is finite, and returns what it multiplies by, in float32.

    These are: the gradient's factor, which clips it and makes a mean of a sum; the learning rate over the first bias
    correction; the root of the second correction, inverted; and 1, or 0 where no step is to be taken.

    Args:
        norm: Of the mean gradient, float32.
        steps: Taken before, float32; counted up in place. Float32 counts to 2^24.
        settings: Of the step.
        max_norm: To which gradients are clipped.
        num_summed: Gradients that were added up and whose mean counts.
    """
    taken = norm.isfinite()
    steps += taken
    count = steps.double()
    first, second = (1 - torch.pow(beta, count) for beta in settings.betas)
    clip = ((norm + _LEAST_NORM) / max_norm).clamp(min=1) * num_summed
    return torch.stack([clip.double().reciprocal(), settings.lr / first, second.rsqrt(), taken]).float()


def adamw_step(
    gradient: Float[Tensor, " N"],
    weights: Float[Tensor, " N"],
    exp_avg: Float[Tensor, " N"],
    exp_avg_sq: Float[Tensor, " N"],
    model_weights: Float[Tensor, " N"],
    factors: Float[Tensor, " 4"],
    settings: AdamWSettings,
    average: Float[Tensor, " N"] | None = None,
    share: float = 0.0,
) -> None:
    """Takes a step in place, or none if the factors say so. All tensors are contiguous.

    Args:
        gradient: In any floating type; it stays as it is.
        weights: The master weights, float32.
        exp_avg: The first moment, float32.
        exp_avg_sq: The second, float32.
        model_weights: Become the weights, rounded to their type.
        factors: See :func:`step_factors`.
        settings: Of the step.
        average: A moving average of the weights, float32, that follows them; None: there is none.
        share: By which share of the way to the new weights.
    """
    tensors = gradient, weights, exp_avg, exp_avg_sq, model_weights
    if gradient.is_cuda:
        from train.ops import adamw_kernels

        adamw_kernels.step(*tensors, factors, settings, average, share)
    else:
        adamw_reference(*tensors, factors, settings, average, share)


def adamw_reference(
    gradient: Float[Tensor, " N"],
    weights: Float[Tensor, " N"],
    exp_avg: Float[Tensor, " N"],
    exp_avg_sq: Float[Tensor, " N"],
    model_weights: Float[Tensor, " N"],
    factors: Float[Tensor, " 4"],
    settings: AdamWSettings,
    average: Float[Tensor, " N"] | None = None,
    share: float = 0.0,
) -> None:
    """:func:`adamw_step` in plain PyTorch. It waits for the device."""
    scale, step_size, inverse_root, taken = factors.unbind()
    if not taken:
        return
    (beta1, beta2), gradient = settings.betas, gradient.float() * scale
    weights.mul_(1 - settings.lr * settings.weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().mul_(inverse_root).add_(settings.eps)
    weights.sub_((exp_avg / denominator).mul_(step_size))
    model_weights.copy_(weights)
    if average is not None:
        average.lerp_(weights, share)
