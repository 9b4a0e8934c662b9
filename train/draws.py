"""Everything random about a sample: drawn from the seed, the epoch and the sample's identity, never from a rank.

Small draws are hashes. Noise is drawn on the device that needs it, from a generator that is seeded with the sample's
key, so it does not travel; other kinds of device give other noise for the same key.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.permutation import Words, hash_words, uniform

_CAPTION, _LEVEL, _DROP, _NOISE, _MASK = 1, 2, 3, 4, 5
_POSTERIOR = 0x5DEECE66D


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDraws:
    """What is drawn for some samples, each in its epoch."""

    caption: np.ndarray
    """(N,) int64: which of its captions a sample is trained with."""
    u: np.ndarray
    """(N,) float64 from [0, 1): what the objective maps to its noise level."""
    drop: np.ndarray
    """(N,) booleans: whether the null caption takes the caption's place."""
    noise_key: np.ndarray
    """(N,) int64, see :func:`standard_normal`."""


def sample_keys(seed: int, epochs: np.ndarray, identity: np.ndarray) -> Words:
    """Returns the key (N,) of samples in their epochs.

    Args:
        seed: Not negative.
        epochs: (N,).
        identity: (N, 2) uint64.
    """
    return hash_words(seed, epochs, identity[:, 0], identity[:, 1])


def draw_samples(keys: Words, num_captions: np.ndarray, *, caption_dropout: float) -> SampleDraws:
    """Returns what is drawn for samples.

    Args:
        keys: (N,), see :func:`sample_keys`.
        num_captions: (N,) at least 1.
        caption_dropout: How often the null caption is trained.
    """
    return SampleDraws(
        caption=draw_captions(keys, num_captions),
        u=uniform(hash_words(keys, _LEVEL)),
        drop=uniform(hash_words(keys, _DROP)) < caption_dropout,
        noise_key=hash_words(keys, _NOISE).view(np.int64),
    )


def draw_captions(keys: Words, num_captions: np.ndarray) -> np.ndarray:
    """Returns which of its captions each sample is trained with."""
    return (uniform(hash_words(keys, _CAPTION)) * num_captions).astype(np.int64)


def standard_normal(keys: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns noise (B, \\*shape), float32, on a device: one sample's by its key.

    Args:
        keys: (B,) int64 on the CPU.
        shape: Of one sample's noise.
        device: Whose generator is used.
    """
    noise = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device)
    for row, key in zip(noise, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return noise


def sample_posterior(moments: Tensor, keys: Tensor) -> Tensor:
    """Returns samples (B, C, T, H, W), float32, of posteriors.

    Args:
        moments: (B, 2C, T, H, W): the means, then the logarithms of the variances.
        keys: (B,) int64 on the CPU: the samples' noise keys; this noise is another than theirs.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = standard_normal(keys ^ _POSTERIOR, tuple(mean.shape[1:]), mean.device)
    return mean + torch.exp(0.5 * logvar) * noise


def draw_for_masks(keys: Tensor, num_draws: int) -> np.ndarray:
    """Returns numbers (B, num_draws) from [0, 1), float64, for the frame masks of samples.

    Args:
        keys: (B,) int64 on the CPU: the samples' noise keys; the noise has no part in these numbers.
        num_draws: A sample.
    """
    words = keys.numpy().view(np.uint64)[:, None]
    return uniform(hash_words(words, _MASK, np.arange(num_draws)))


def sample_generator(seed: int, name: str) -> np.random.Generator:
    """Returns a generator that a seed and a name decide."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
