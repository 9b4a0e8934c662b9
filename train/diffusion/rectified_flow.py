# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Rectified flow: a straight line from the clip to noise, and a model that predicts the way back.

Sources: Liu, Gong and Liu, arXiv 2209.03003, for the flow; Esser et al., arXiv 2403.03206, for logit-normal times and
the shift of times by resolution; Open-Sora v1.2 (``opensora/schedulers/rf``) for the sign of the velocity, for the
shift by length and for frames that are given.

Time runs from 0 (the clip) to 1 (noise); the model is told 1000 times as much. Letters: B batch, C channels, T frames,
H and W rows and columns.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.errors import InputError
from train.diffusion.terms import Denoiser, GivenFrames, LossTerms, per_frame, sample_means

MODEL_TIMESCALE = 1000
"""What the model is told at time 1."""
BASE_PIXELS = 512 * 512
"""Pixels of a frame at which times are not shifted."""

TimeDistribution = Literal["logit-normal", "uniform"]


def times_at(u: Float[Tensor, " B"], distribution: TimeDistribution) -> Float[Tensor, " B"]:
    """Returns the times at the quantiles ``u`` (from [0, 1)) of their distribution, of u's type.

    A logit-normal time is the sigmoid of a standard normal number, so that most are about the middle
    (arXiv 2403.03206, equation 19 with m = 0, s = 1).
    """
    return torch.special.ndtri(u).sigmoid() if distribution == "logit-normal" else u


def shift_ratio(frame_pixels: int, latent_frames: int) -> float:
    """Returns by how much the noise is to grow with the size of a clip: 1 for an image of 512x512.

    Open-Sora v1.2 takes the root of the pixels over 512^2 times the root of ``num_frames // 17 * 5``, which are the
    latent frames of its autoencoder at whole chunks; this takes the latent frames of any.

    Args:
        frame_pixels: Height times width of a frame.
        latent_frames: 1 for an image.
    """
    return math.sqrt(frame_pixels / BASE_PIXELS) * math.sqrt(latent_frames)


def shift_times(times: Float[Tensor, " N"], ratio: float) -> Float[Tensor, " N"]:
    """Returns ``r t / (1 + (r - 1) t)``: times at which a clip with r^2 times the values is as noisy as one without.

    Source: arXiv 2403.03206, equation 23.
    """
    return ratio * times / (1 + (ratio - 1) * times)


def add_noise(
    x0: Float[Tensor, "B C T H W"],
    time: Float[Tensor, " B"],
    noise: Float[Tensor, "B C T H W"],
    frame_mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Returns ``(1 - t) x0 + t noise``; x0 where ``frame_mask`` is False."""
    t = time.to(x0.dtype).view(-1, 1, 1, 1, 1)
    x_t = (1 - t) * x0 + t * noise
    return x_t if frame_mask is None else torch.where(per_frame(frame_mask), x_t, x0)


def training_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "B C T H W"],
    time: Float[Tensor, " B"],
    noise: Float[Tensor, "B C T H W"],
    frame_mask: Bool[Tensor, "B T"] | None = None,
) -> LossTerms:
    """Returns the squared error of each sample's predicted velocity ``x0 - noise``, its mean in float32.

    Args:
        denoiser: The model, with its conditions, ``frame_mask`` among them. Its first C channels count.
        x0: Latents, float32.
        time: From 0 to 1.
        noise: Standard normal, float32.
        frame_mask: False at frames that are given: they get no noise and count in no loss. Every sample has one True.
    """
    x_t = add_noise(x0, time, noise, frame_mask)
    velocity = denoiser(x_t, (MODEL_TIMESCALE * time).float())[:, : x0.shape[1]]
    mse = sample_means((velocity - (x0 - noise)).square(), frame_mask)
    return LossTerms(loss=mse, parts={"mse": mse})


def sampling_times(num_steps: int, ratio: float = 1.0) -> Float[Tensor, " N+1"]:
    """Returns the times of ``num_steps`` steps, from 1 to 0, evenly spaced before they are shifted, in float64.

    Raises:
        InputError: if there is not one step at least.
    """
    if num_steps < 1:
        raise InputError(f"{num_steps} sampling steps: expected at least 1")
    return shift_times(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), ratio)


@torch.no_grad()
def sample_euler(
    times: Float[Tensor, " N+1"],
    denoiser: Denoiser,
    x: Float[Tensor, "B C T H W"],
    given: GivenFrames | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Returns x_0 from pure noise by Euler's steps.

    Args:
        times: See :func:`sampling_times`.
        denoiser: The model, with its conditions and guidance, the mask of given frames among them.
        x: Standard normal.
        given: Frames to keep.
    """
    x = x if given is None else given.kept_in(x)
    for time, later in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        told = torch.full((x.shape[0],), MODEL_TIMESCALE * time, device=x.device)
        velocity = denoiser(x, told)[:, : x.shape[1]]
        x = x + (time - later) * velocity
        x = x if given is None else given.kept_in(x)
    return x
