# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Latents from captions: noise by name, guidance, conditions, sampler.

Letters: B clips, C channels, T frames, H and W rows and columns, L caption tokens, D their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from train.conditions import Conditions, denoiser
from train.diffusion.guidance import guided
from train.diffusion.samplers import Sampler
from train.diffusion.terms import GivenFrames
from train.draws import sample_generator
from train.model.transformer import DiffusionTransformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSize:
    """What is made, as the latent has it and as a model is told."""

    latent: tuple[int, int, int]
    """Latent frames, rows and columns."""
    height: int
    """In pixels."""
    width: int
    """In pixels."""
    fps: float
    """Frames a second; of an image ``IMAGE_FPS``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """With which frames a clip begins."""

    latents: Float[Tensor, "C N H W"]
    """N latent frames."""

    def given(self, size: tuple[int, int, int], copies: int, device: torch.device) -> GivenFrames:
        """Returns them as what sampling keeps of ``copies`` latents of ``size``."""
        channels, count = self.latents.shape[:2]
        latents = torch.zeros(copies, channels, *size, device=device)
        latents[:, :, :count] = self.latents.to(device, torch.float32)
        made: Bool[Tensor, "B T"] = (torch.arange(size[0], device=device) >= count).expand(copies, -1)
        return GivenFrames(latents=latents, frame_mask=made)


@torch.no_grad()
def sample_latents(
    model: DiffusionTransformer,
    sampler: Sampler,
    captions: Sequence[Float[Tensor, "L D"]],
    size: ClipSize,
    *,
    prompts: Sequence[str],
    seed: int,
    guidance: float,
    guidance_channels: int | None = None,
    head: Head | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Returns a latent for each prompt. Its noise depends on its prompt and the seed alone, whatever the others are.

    Args:
        model: In evaluation mode, on the captions' device.
        sampler: One that fits what the model was trained for.
        captions: The prompts' embeddings; L may differ.
        size: What to make.
        prompts: Name the noise.
        seed: Not negative.
        guidance: 1 is no guidance.
        guidance_channels: See :func:`train.diffusion.guidance.guided`.
        head: Frames to begin with, for a model that takes a mask of frames.
    """
    device, channels = captions[0].device, model.config.in_channels
    generators = [sample_generator(seed, prompt) for prompt in prompts]
    given = None if head is None else head.given(size.latent, len(prompts), device)
    conditions = conditions_of(
        captions, size, guidance=guidance, frame_mask=None if given is None else given.frame_mask
    )
    predict = denoiser(model, conditions, wants_size=model.wants_size)

    def draw_noise() -> Tensor:
        shape = (channels, *size.latent)
        noise = np.stack([generator.standard_normal(shape, dtype="float32") for generator in generators])
        return torch.from_numpy(noise).to(device)

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        if guidance == 1:
            return predict(x, timestep)
        conditional, unconditional = predict(torch.cat([x, x]), timestep.repeat(2)).chunk(2)
        return guided(conditional, unconditional, guidance, channels, guidance_channels)

    return sampler.sample(denoise, draw_noise(), draw_noise, given)


def conditions_of(
    captions: Sequence[Float[Tensor, "L D"]],
    size: ClipSize,
    *,
    guidance: float,
    frame_mask: Bool[Tensor, "B T"] | None = None,
) -> Conditions:
    """Returns what a model is told of B clips; with guidance of 2 B: the same again with the null caption.

    Args:
        captions: Embeddings of the prompts, which are padded where L differs.
        size: Of the clips.
        guidance: 1 is no guidance.
        frame_mask: See :class:`~train.conditions.Conditions`.
    """
    device, number, copies = captions[0].device, len(captions), 2 if guidance != 1 else 1
    lengths = [len(caption) for caption in captions]
    longest = max(lengths)
    padded = torch.stack([F.pad(caption, (0, 0, 0, longest - len(caption))) for caption in captions])
    mask = None
    if min(lengths) < longest:
        valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
        mask = valid.long().repeat(copies, 1).to(device)

    def for_all(value: float) -> Tensor:
        return torch.full((copies * number,), float(value), device=device)

    return Conditions(
        captions=padded[:, None].repeat(copies, 1, 1, 1),
        mask=mask,
        drop_caption=torch.arange(copies * number, device=device) >= number if copies == 2 else None,
        fps=for_all(size.fps),
        height=for_all(size.height),
        width=for_all(size.width),
        frame_mask=None if frame_mask is None else frame_mask.repeat(copies, 1),
    )
