# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): from the null caption's prediction towards the
caption's, and beyond.

Letters: B batch, C channels of the latent, O channels of the prediction, T frames, H and W rows and columns.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import InputError


def guided(
    conditional: Float[Tensor, "B O T H W"],
    unconditional: Float[Tensor, "B O T H W"],
    scale: float,
    latent_channels: int,
    guidance_channels: int | None = None,
) -> Float[Tensor, "B O T H W"]:
    """Returns the prediction under guidance; what stands behind the latent's channels is the conditional one's.

    Args:
        conditional: With the caption: of the noise or the velocity, and perhaps of the variance behind it.
        unconditional: With the null caption.
        scale: 1 is no guidance.
        latent_channels: C.
        guidance_channels: Guide only so many of the first channels; all C if None. Open-Sora v1.0 guides 3 of 4.

    Raises:
        InputError: if the latent has not so many channels.
    """
    channels = latent_channels if guidance_channels is None else guidance_channels
    if not 1 <= channels <= latent_channels:
        raise InputError(f"guidance_channels={channels}: expected 1 to {latent_channels} latent channels")
    towards, away = conditional[:, :channels], unconditional[:, :channels]
    return torch.cat([away + scale * (towards - away), conditional[:, channels:]], dim=1)
