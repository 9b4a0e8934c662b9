"""A frozen autoencoder between frames and latents, with its own normalisation.

Thin over diffusers' ``AutoencoderKL``: image autoencoders encode each frame by itself. Stored latents are normalised:
``(z - shift_factor) * scaling_factor``, so that a diffusion model sees about unit variance.
"""

import hashlib
import math
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from shared.encoders.fingerprint import weights_sha256
from shared.encoders.location import locate
from shared.errors import InputError
from shared.spec import Posterior, VaeGeometry


class VideoAutoencoder:
    """An autoencoder for clips. Build it with :meth:`load`."""

    def __init__(self, model: AutoencoderKL, *, name: str, micro_batch: int, posterior: Posterior) -> None:
        self._model, self._name, self.micro_batch, self._posterior = model, name, micro_batch, posterior
        self._scale = float(model.config.scaling_factor)
        self._shift = float(getattr(model.config, "shift_factor", None) or 0.0)
        self._weights_sha256 = weights_sha256(model)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        micro_batch: int = 16,
        posterior: Posterior = "sample",
    ) -> "VideoAutoencoder":
        """Loads an autoencoder from a hub id (e.g. ``stabilityai/sd-vae-ft-ema``) or a local folder.

        Args:
            model: Hub id, folder, or ``demo:vae``.
            device: Where it runs.
            dtype: Type of its weights and activations.
            micro_batch: Frames a forward pass; bounds the memory.
            posterior: What :meth:`encode` returns of it.

        Raises:
            InputError: if there is no such model or it is of another class.
        """
        _check_class(model)
        try:
            loaded, found = AutoencoderKL.from_pretrained(
                locate(model), low_cpu_mem_usage=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"VAE {model!r}: not loadable ({error}): expected an AutoencoderKL") from None
        if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise InputError(
                f"VAE {model!r}: {len(lacking)} weights are missing or of another shape, e.g. {lacking[0]}: "
                "expected those of its configuration"
            )
        loaded.eval().requires_grad_(False)
        vae = cls(loaded, name=model, micro_batch=micro_batch, posterior=posterior)
        torch.nn.Module.to(loaded, device, dtype)
        return vae

    @property
    def geometry(self) -> VaeGeometry:
        """Channels and strides."""
        return _geometry(self._model.config)

    def provenance(self) -> dict[str, Any]:
        """Returns what decides the latents, for ``dataset.json``."""
        geometry = self.geometry
        return {
            "model": self._name,
            "model_class": type(self._model).__name__,
            "weights_sha256": self._weights_sha256,
            "precision": str(self._model.dtype).removeprefix("torch."),
            "latent_channels": geometry.latent_channels,
            "spatial_stride": geometry.spatial_stride,
            "temporal_stride": geometry.temporal_stride,
            "scaling_factor": self._scale,
            "shift_factor": self._shift,
            "posterior": self._posterior,
            "micro_batch": self.micro_batch,
        }

    @torch.inference_mode()
    def encode(self, frames: np.ndarray, *, seed: str) -> torch.Tensor:
        """Returns what is stored of the posterior, normalised, float32, on this device.

        A sample or the mean is (C, T, H, W). Mean and logarithm of the variance, both of the normalised latent, stand
        one behind the other, (2C, T, H, W): ``mean + exp(logvar / 2) * noise`` is a sample.

        Args:
            frames: (T, height, width, 3), uint8, RGB.
            seed: Names the noise; the sample's identity, so that encoding again gives the same latent anywhere.
        """
        latents = []
        for start in range(0, len(frames), self.micro_batch):
            pixels = torch.from_numpy(frames[start : start + self.micro_batch]).to(self._model.device)
            pixels = pixels.permute(0, 3, 1, 2).to(self._model.dtype) / 127.5 - 1
            posterior = self._model.encode(pixels).latent_dist
            latents.append((posterior.mean.float(), posterior.logvar.float()))
        mean = torch.cat([part for part, _ in latents])
        logvar = torch.cat([part for _, part in latents])
        if self._posterior == "sample":
            noise = torch.randn(mean.shape, generator=_generator(seed)).to(mean.device)
            mean = mean + torch.exp(0.5 * logvar) * noise
        latent = (mean - self._shift) * self._scale
        if self._posterior == "mean+logvar":
            latent = torch.cat([latent, logvar + 2 * math.log(self._scale)], dim=1)
        return latent.transpose(0, 1).contiguous()

    @torch.inference_mode()
    def decode(self, latent: torch.Tensor) -> np.ndarray:
        """Returns the frames (T, height, width, 3), uint8, RGB, of a normalised latent (C, T, H, W)."""
        z = latent.to(self._model.device, torch.float32).transpose(0, 1) / self._scale + self._shift
        frames = []
        for part in z.to(self._model.dtype).split(self.micro_batch):
            pixels = self._model.decode(part).sample.float()
            frames.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(frames).numpy()


def read_geometry(model: str) -> VaeGeometry:
    """Returns a VAE's channels and strides from its configuration, without loading weights.

    Raises:
        InputError: if there is no such model or it is of another class.
    """
    return _geometry(_check_class(model))


def _check_class(model: str) -> Any:
    try:
        config = AutoencoderKL.load_config(locate(model))
    except (OSError, ValueError) as error:
        raise InputError(f"VAE {model!r}: no configuration found ({error}): expected a folder or a hub id") from None
    if config.get("_class_name") != AutoencoderKL.__name__:
        raise InputError(f"VAE {model!r}: found class {config.get('_class_name')}: expected {AutoencoderKL.__name__}")
    return config


def _geometry(config: Any) -> VaeGeometry:
    return VaeGeometry(
        latent_channels=config["latent_channels"], spatial_stride=2 ** (len(config["block_out_channels"]) - 1)
    )


def _generator(seed: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(number)


VERSIONS = {"diffusers": diffusers.__version__}
"""Recorded beside every shard."""
