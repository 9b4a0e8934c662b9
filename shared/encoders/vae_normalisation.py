"""The affine map between an autoencoder's own latents and those that are stored, ``(z - shift) * scale``."""

import math

import torch
from torch import Tensor

Factor = float | list[float]
"""One number, or one a channel."""


class Normalisation:
    """Shift and scale, ready for tensors (T, C, H, W) on one device.

    Args:
        shift: Mean of the autoencoder's own latents.
        scale: One over their deviation.
        device: Of the tensors.
    """

    def __init__(self, shift: Factor, scale: Factor, device: torch.device) -> None:
        self.shift, self.scale = shift, scale
        self._shift, self._scale = _by_channel(shift, device), _by_channel(scale, device)
        logarithms = [2 * math.log(each) for each in scale] if isinstance(scale, list) else 2 * math.log(scale)
        self._logvar_shift = _by_channel(logarithms, device)

    def apply(self, z: Tensor) -> Tensor:
        """Returns what is stored of a latent."""
        return (z - self._shift) * self._scale

    def apply_to_logvar(self, logvar: Tensor) -> Tensor:
        """Returns the logarithm of the variance of what is stored."""
        return logvar + self._logvar_shift

    def undo(self, latent: Tensor) -> Tensor:
        """Returns the autoencoder's own latent."""
        return latent / self._scale + self._shift


def _by_channel(factor: Factor, device: torch.device) -> float | Tensor:
    return factor if isinstance(factor, float) else torch.tensor(factor, device=device)[:, None, None]
