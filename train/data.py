"""What a rank trains on in one step, and where it comes from. The loader's parts:

``plan`` and ``bucket_walk`` say which samples a step takes; ``sample_index`` holds where they lie, shared by the
processes of a node; ``run_reader`` fetches, ``rank_batches`` checks and decodes, ``loader`` runs that in processes.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache.identity import identity_texts
from train.draws import sample_posterior, standard_normal


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one rank trains on in one step."""

    latents: Tensor
    """(B, C, T, H, W), or (B, 2C, T, H, W) of ``moments``; bfloat16, or float32 where the cache stores that."""
    u: Tensor
    """(B,) from [0, 1), float64: what the objective maps to noise levels."""
    noise_keys: Tensor
    """(B,) int64, on the CPU: what the noise is drawn from."""
    captions: Tensor
    """(B, 1, L, D), padded with zeros, of a type as the latents'."""
    mask: Tensor
    """(B, L) 1 at valid caption tokens. On the CPU until :meth:`to`: what is counted then waits for no device."""
    drop_caption: Tensor
    """(B,) True where the null caption is trained."""
    fps: Tensor
    """(B,) frames a second of the frames that were taken, float32; ``IMAGE_FPS`` of images."""
    height: Tensor
    """(B,) of the frames, in pixels, float32."""
    width: Tensor
    """(B,) likewise."""
    identity: Tensor
    """(B, 2) int64, on the CPU: the samples' identities, see :attr:`samples`."""
    moments: bool = False
    """The latents are means and logarithms of variances, to be sampled anew each epoch."""
    num_skipped: int = 0
    """Samples that could not be read, and whose places others took."""
    encode_seconds: float = 0.0
    """What encoding took of the host, where samples are encoded online: no waiting for data, but part of the step."""

    def __len__(self) -> int:
        return len(self.u)

    @property
    def caption_tokens(self) -> float:
        """Mean number of valid caption tokens."""
        return float(self.mask.sum()) / len(self)

    @property
    def samples(self) -> list[str]:
        """The identities of its samples, as the index writes them."""
        return identity_texts(self.identity.numpy().view(np.uint64))

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device, all but its keys and identities."""
        tensors: dict[str, Any] = {
            f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        del tensors["noise_keys"], tensors["identity"]
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)

    def split(self, num_parts: int) -> "list[Batch]":
        """Returns the batch in parts of equal size; ``num_parts`` divides it."""
        if num_parts == 1:
            return [self]
        chunks: list[dict[str, Any]] = [{} for _ in range(num_parts)]
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                for part, chunk in zip(chunks, value.chunk(num_parts), strict=True):
                    part[field.name] = chunk
        return [replace(self, **part) for part in chunks]

    def clean_latents(self) -> Tensor:
        """Returns the latents (B, C, T, H, W) to train on, float32; of moments a sample."""
        return sample_posterior(self.latents, self.noise_keys) if self.moments else self.latents.float()

    def noise(self) -> Tensor:
        """Returns standard normal noise (B, C, T, H, W), float32, on the latents' device."""
        channels, *size = self.latents.shape[1:]
        shape = (channels // 2 if self.moments else channels, *size)
        return standard_normal(self.noise_keys, shape, self.latents.device)
