# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""T5 and the autoencoder in front of every step, at their real sizes with random weights, in the ways to be compared.

Letters: B batch, T frames, L caption tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Int, UInt8
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from shared.encoders.architectures import ARCHITECTURES
from shared.encoders.fast_t5 import FastT5, pack
from shared.encoders.fast_vae import make_fast
from shared.encoders.measure_rates import T5_XXL
from train.benchmark.step_settings import BASELINE, FASTER_BOTH, FASTER_T5
from train.data import Batch

_LATENT_SCALE = 0.18215
_FRAMES_A_PASS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSizes:
    """What of the encoders differs from T5-XXL and SD's autoencoder; tests take small ones."""

    t5: dict[str, Any]
    vae: dict[str, Any]


class OnlineWork:
    """Clips and captions of one batch, and their encoders.

    Args:
        frames: Of a clip.
        size: Pixels of height and width.
        batch: Clips.
        caption_tokens: Of each caption.
        sizes: Of the encoders.
        device: Of the encoders.
    """

    def __init__(
        self, *, frames: int, size: int, batch: int, caption_tokens: int, sizes: EncoderSizes, device: torch.device
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device(device):
            t5 = T5EncoderModel(T5Config(**{**T5_XXL, **sizes.t5})).eval().requires_grad_(False).to(dtype)
            vae = AutoencoderKL(**{**ARCHITECTURES["sd"].config, **sizes.vae}).eval().requires_grad_(False).to(dtype)
        vae.decoder = None
        self._t5, self._vae, self._dtype, self._batch = t5, vae, dtype, batch
        generator = torch.Generator().manual_seed(0)
        self._ids: Int[Tensor, "B L"] = torch.randint(2, 32_000, (batch, caption_tokens), generator=generator)
        pixels = torch.randint(0, 256, (batch * frames, 3, size, size), generator=generator, dtype=torch.uint8)
        self._pixels: UInt8[Tensor, "B*T 3 H W"] = pixels.pin_memory() if device.type == "cuda" else pixels
        self._device = device

    def ways(self) -> dict[str, Callable[[Batch], Batch]]:
        """Returns what is to be done to a batch before its step, by the name of the row."""
        fast_t5, fast_vae = FastT5(self._t5, max_tokens=self._ids.shape[1]), make_fast(self._vae)

        def plain_captions() -> Tensor:
            ids = self._ids.to(self._device, non_blocking=True)
            hidden: Tensor = self._t5(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return hidden

        def fast_captions() -> Tensor:
            return fast_t5(pack(self._ids.tolist(), self._device)).view(*self._ids.shape, -1)

        def plain_latents() -> Tensor:
            moments: Tensor = self._vae.quant_conv(self._vae.encoder(self._normalised(self._pixels)))
            return moments

        def fast_latents() -> Tensor:
            return torch.cat([fast_vae(self._normalised(part)) for part in self._pixels.split(_FRAMES_A_PASS)])

        def way(captions: Callable[[], Tensor], moments: Callable[[], Tensor]) -> Callable[[Batch], Batch]:
            @torch.no_grad()
            def encode(batch: Batch) -> Batch:
                mean, logvar = moments().unflatten(0, (self._batch, -1)).transpose(1, 2).chunk(2, dim=1)
                latents = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * _LATENT_SCALE
                hidden = captions()
                padded = torch.zeros_like(batch.captions)
                padded[:, 0, : hidden.shape[1]] = hidden
                return replace(batch, latents=latents.to(batch.latents.dtype), captions=padded)

            return encode

        return {
            BASELINE: way(plain_captions, plain_latents),
            FASTER_T5: way(fast_captions, plain_latents),
            FASTER_BOTH: way(fast_captions, fast_latents),
        }

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device, non_blocking=True).to(self._dtype) / 127.5 - 1
