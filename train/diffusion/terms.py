# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""What every diffusion process here shares: the model as it sees it, the loss of a batch, and means over frames.

Letters: B batch, C channels, T frames, H and W rows and columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, T, H, W), timestep (B,) from 0 to 1000) -> prediction (B, C or 2C, T, H, W): the model, with its
conditions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The loss of each sample, (B,) each."""

    loss: Tensor
    """What is minimised."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What it is made of, by name, for the log."""


def sample_means(values: Float[Tensor, "B C T H W"], frame_mask: Bool[Tensor, "B T"] | None) -> Float[Tensor, " B"]:
    """Returns each sample's mean over the frames that ``frame_mask`` has True; over all of them if it is None."""
    if frame_mask is None:
        return values.flatten(1).mean(1)
    frames = values.transpose(1, 2).flatten(2).mean(2)  # (B, T)
    return (frames * frame_mask).sum(1) / frame_mask.sum(1)


def per_frame(values: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T 1 1"]:
    """Returns what belongs to frames, shaped to broadcast over latents."""
    return values[:, None, :, None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenFrames:
    """Frames that sampling is to keep: those of ``latents`` where ``frame_mask`` is False."""

    latents: Float[Tensor, "B C T H W"]
    """What is given; frames that are made may hold anything."""
    frame_mask: Bool[Tensor, "B T"]
    """True at the frames to make, as the model is told."""

    def kept_in(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C T H W"]:
        """Returns ``x`` with the given frames in their places."""
        return torch.where(per_frame(self.frame_mask), x, self.latents)
