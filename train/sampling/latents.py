# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""One latent from one caption: noise by name, guidance, conditions, sampler.

Letters: C channels, T frames, H and W rows and columns, L caption tokens, D their width.
"""

from dataclasses import dataclass

import torch
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
def sample_latent(
    model: DiffusionTransformer,
    sampler: Sampler,
    caption: Float[Tensor, "L D"],
    size: ClipSize,
    *,
    prompt: str,
    seed: int,
    guidance: float,
    guidance_channels: int | None = None,
    head: Head | None = None,
) -> Float[Tensor, "C T H W"]:
    """Returns one latent; its noise depends on the prompt and the seed alone.

    Args:
        model: In evaluation mode, on the caption's device.
        sampler: One that fits what the model was trained for.
        caption: The prompt's embedding.
        size: What to make.
        prompt: Names the noise.
        seed: Not negative.
        guidance: 1 is no guidance.
        guidance_channels: See :func:`train.diffusion.guidance.guided`.
        head: Frames to begin with, for a model that takes a mask of frames.
    """
    device = caption.device
    channels = model.config.in_channels
    shape = (1, channels, *size.latent)
    generator = sample_generator(seed, prompt)
    copies = 2 if guidance != 1 else 1
    given = None if head is None else head.given(size.latent, 1, device)
    conditions = Conditions(
        captions=caption[None, None].expand(copies, -1, -1, -1),
        mask=None,
        drop_caption=torch.tensor([False, True], device=device) if copies == 2 else None,
        fps=torch.full((copies,), float(size.fps), device=device),
        height=torch.full((copies,), float(size.height), device=device),
        width=torch.full((copies,), float(size.width), device=device),
        frame_mask=None if given is None else given.frame_mask.expand(copies, -1),
    )
    predict = denoiser(model, conditions, wants_size=model.wants_size)

    def draw_noise() -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype="float32")).to(device)

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        if copies == 1:
            return predict(x, timestep)
        conditional, unconditional = predict(torch.cat([x, x]), timestep.repeat(2)).chunk(2)
        return guided(conditional, unconditional, guidance, channels, guidance_channels)

    return sampler.sample(denoise, draw_noise(), draw_noise, given)[0]
