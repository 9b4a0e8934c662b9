"""What a model is told beside the latents: captions, sizes, and which frames are given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.data import Batch
from train.diffusion.frame_masks import NUM_DRAWS, MaskStrategy, frame_masks
from train.diffusion.terms import Denoiser
from train.draws import draw_for_masks


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """The conditions of B samples, on the model's device."""

    captions: Tensor
    """(B, 1, L, D), padded."""
    mask: Tensor | None
    """(B, L) nonzero at valid caption tokens; None: all are."""
    drop_caption: Tensor | None
    """(B,) True where the null caption takes the caption's place; None: nowhere."""
    fps: Tensor
    """(B,) frames a second, float32; ``IMAGE_FPS`` of images."""
    height: Tensor
    """(B,) of the frames, in pixels, float32."""
    width: Tensor
    """(B,) likewise."""
    frame_mask: Tensor | None = None
    """(B, T) True at latent frames that are made, False at those that are given; None: all are made."""

    @classmethod
    def of_batch(cls, batch: Batch, frame_mask: Tensor | None = None) -> "Conditions":
        """Returns the conditions of a batch on the model's device."""
        return cls(
            captions=batch.captions,
            mask=batch.mask,
            drop_caption=batch.drop_caption,
            fps=batch.fps,
            height=batch.height,
            width=batch.width,
            frame_mask=frame_mask,
        )


def denoiser(model: Callable[..., Any], conditions: Conditions, *, wants_size: bool) -> Denoiser:
    """Returns the model with its conditions, as objectives and samplers call it.

    Args:
        model: Or the engine around it.
        conditions: Of as many samples as it will be called with.
        wants_size: The model's attribute: whether it takes fps, height, width and a mask of frames.
    """
    told: dict[str, Any] = {"drop_caption": conditions.drop_caption}
    if wants_size:
        told |= {"fps": conditions.fps, "height": conditions.height, "width": conditions.width}
        told |= {"x_mask": conditions.frame_mask}
    assert wants_size or conditions.frame_mask is None

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        prediction: Tensor = model(x, timestep, conditions.captions, conditions.mask, **told)
        return prediction

    return denoise


def draw_frame_mask(batch: Batch, ratios: Mapping[MaskStrategy, float]) -> Tensor:
    """Returns which latent frames (B, T) of each sample are made, on the batch's device.

    Args:
        batch: Its samples' keys decide.
        ratios: How often each strategy is taken, see :func:`train.diffusion.frame_masks.parse_mask_ratios`.
    """
    num_frames = batch.latents.shape[2]
    made = frame_masks(ratios, num_frames, draw_for_masks(batch.noise_keys, NUM_DRAWS + num_frames))
    return torch.from_numpy(made).to(batch.latents.device, non_blocking=True)
