"""What differs between autoencoders: strides, normalisation, and how they are called.

One entry a class, under the name in the model's ``config.json``. Latents are normalised as each model was published,
``(z - shift) * scale``, so that a diffusion model trained elsewhere on such latents can be used.

Letters: N frames or clips, C channels, T frames of a clip, h and w rows and columns of pixels.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)
from torch import Tensor, nn

from shared.encoders.fast_vae import make_fast, why_not
from shared.encoders.opensora_vae import CHUNK_FRAMES, OpenSoraVae
from shared.encoders.vae_geometry import Config, geometry_by
from shared.encoders.vae_normalisation import Factor
from shared.spec import VaeGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How autoencoders of one class are used."""

    model_class: type[nn.Module]
    geometry: Callable[[Config], VaeGeometry]
    """Channels and strides, from the configuration with the class's defaults."""
    normalisation: Callable[[Any], tuple[Factor, Factor]]
    """Shift and scale of a model whose weights are loaded."""
    encode: Callable[[Any, Tensor, int], tuple[Tensor, Tensor | None]]
    """Takes the model, pixels and frames a pass. Returns mean and, if there is a posterior, logarithm of the variance.
    Pixels and latents are (N, C, h, w) of image autoencoders, (N, C, T, h, w) of others."""
    decode: Callable[[Any, Tensor, int, int], Tensor]
    """Takes the model, latents, frames of the clip and frames a pass; returns pixels, -1 to 1. Shapes as of encode."""
    is_image: bool = False
    """Encodes every frame by itself, so that frames of several clips can go through at once."""
    has_posterior: bool = True
    """Gives a mean and a variance; a deterministic autoencoder gives one latent."""
    cuts_frames: bool = False
    """A clip's frames can go through in several passes without a change of its latent."""
    compile: Callable[[Any], None]
    """Makes a loaded model on a GPU faster, where that works."""


def with_defaults(model_class: type[nn.Module], config: Config) -> dict[str, Any]:
    """Returns a configuration with the defaults of its class where it is silent."""
    parameters = inspect.signature(model_class.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty} | {
        key: value for key, value in config.items() if value is not None
    }


def _scalar(model: Any) -> tuple[Factor, Factor]:
    shift = getattr(model.config, "shift_factor", None)
    return float(shift or 0.0), float(model.config.scaling_factor)


def _wan_normalisation(model: AutoencoderKLWan) -> tuple[Factor, Factor]:
    return list(model.config.latents_mean), [1 / deviation for deviation in model.config.latents_std]


def _ltx_normalisation(model: AutoencoderKLLTXVideo) -> tuple[Factor, Factor]:
    scale = float(model.config.scaling_factor)
    return model.latents_mean.tolist(), (scale / model.latents_std.double()).tolist()


def _opensora_normalisation(model: OpenSoraVae) -> tuple[Factor, Factor]:
    return model.shift.flatten().tolist(), (1 / model.scale.double()).flatten().tolist()


def _posterior(model: Any, pixels: Tensor, _: int) -> tuple[Tensor, Tensor]:
    posterior = model.encode(pixels).latent_dist
    return posterior.mean, posterior.logvar


def _hunyuan_posterior(model: AutoencoderKLHunyuanVideo, pixels: Tensor, _: int) -> tuple[Tensor, Tensor]:
    model.use_framewise_encoding = False  # else clips of over 16 frames are cut, and their latents blended
    return _posterior(model, pixels, _)


def _decode_frames(model: Any, latent: Tensor, _: int, frames_a_pass: int) -> Tensor:
    return torch.cat([model.decode(part).sample for part in latent.split(frames_a_pass)])


def _decode_clip(model: Any, latent: Tensor, _: int, __: int) -> Tensor:
    pixels: Tensor = model.decode(latent).sample
    return pixels


def _decode_ltx(model: AutoencoderKLLTXVideo, latent: Tensor, _: int, __: int) -> Tensor:
    noise_level = latent.new_zeros(len(latent)) if model.config.timestep_conditioning else None
    pixels: Tensor = model.decode(latent, noise_level).sample
    return pixels


def _make_fast(model: AutoencoderKL) -> None:
    if why_not(model) is None:
        model._encode = make_fast(model)  # encode() makes the posterior of what this returns
    else:
        _compile_image_encoder(model)


def _compile_image_encoder(model: Any) -> None:
    model.to(memory_format=torch.channels_last)
    _compile_encoder(model)


def _compile_encoder(model: Any) -> None:
    model.encoder.compile(dynamic=False)


def _compile_opensora(model: OpenSoraVae) -> None:
    _make_fast(model.spatial_vae.module)
    model.temporal_vae.encoder.compile(dynamic=False)


def _leave_eager(model: Any) -> None:
    """The encoders of CogVideoX and Wan keep earlier frames in Python lists, which torch.compile stumbles over."""


FAMILIES: dict[str, Family] = {
    "AutoencoderKL": Family(
        model_class=AutoencoderKL,
        geometry=geometry_by("AutoencoderKL"),
        compile=_make_fast,
        normalisation=_scalar,
        encode=_posterior,
        decode=_decode_frames,
        is_image=True,
        cuts_frames=True,
    ),
    "AutoencoderDC": Family(
        model_class=AutoencoderDC,
        geometry=geometry_by("AutoencoderDC"),
        compile=_compile_image_encoder,
        normalisation=_scalar,
        encode=lambda model, pixels, _: (model.encode(pixels).latent, None),
        decode=_decode_frames,
        is_image=True,
        has_posterior=False,
        cuts_frames=True,
    ),
    "AutoencoderKLCogVideoX": Family(
        model_class=AutoencoderKLCogVideoX,
        geometry=geometry_by("AutoencoderKLCogVideoX"),
        compile=_leave_eager,
        normalisation=_scalar,  # invert_scale_latents is about CogVideoX 1.5's conditioning image, not about clips
        encode=_posterior,
        decode=_decode_clip,
    ),
    "AutoencoderKLWan": Family(
        model_class=AutoencoderKLWan,
        geometry=geometry_by("AutoencoderKLWan"),
        compile=_leave_eager,
        normalisation=_wan_normalisation,
        encode=_posterior,
        decode=_decode_clip,
    ),
    "AutoencoderKLHunyuanVideo": Family(
        model_class=AutoencoderKLHunyuanVideo,
        geometry=geometry_by("AutoencoderKLHunyuanVideo"),
        compile=_compile_encoder,
        normalisation=_scalar,
        encode=_hunyuan_posterior,
        decode=_decode_clip,
    ),
    "AutoencoderKLLTXVideo": Family(
        model_class=AutoencoderKLLTXVideo,
        geometry=geometry_by("AutoencoderKLLTXVideo"),
        compile=_compile_encoder,
        normalisation=_ltx_normalisation,
        encode=_posterior,
        decode=_decode_ltx,
    ),
    "VideoAutoencoderPipeline": Family(
        model_class=OpenSoraVae,
        geometry=lambda config: VaeGeometry(
            latent_channels=config["temporal"]["channels"],
            spatial_stride=2 ** (len(config["spatial"]["block_out_channels"]) - 1),
            temporal_stride=2 ** sum(config["temporal"]["temporal_downsample"]),
            chunk_frames=CHUNK_FRAMES,
        ),
        compile=_compile_opensora,
        normalisation=_opensora_normalisation,
        encode=lambda model, pixels, frames: model.encode(pixels, frames),
        decode=lambda model, latent, num_frames, frames: model.decode(latent, num_frames, frames),
        cuts_frames=True,
    ),
}
"""By the class that ``config.json`` names."""
