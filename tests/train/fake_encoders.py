"""Encoders that fit the synthetic caches: small, exact, and quick."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.synthetic_cache import TEXT_CHANNELS, provenance


class FakeTextEncoder:
    """One token a word, its embedding from the word's length."""

    @classmethod
    def load(cls, _model: str, **_options: Any) -> "FakeTextEncoder":
        return cls()

    def provenance(self) -> dict[str, Any]:
        return provenance()["text.t5"]

    def encode(self, captions: list[str]) -> list[Tensor]:
        return [torch.stack([torch.full((TEXT_CHANNELS,), len(w) / 5) for w in c.split()]) for c in captions]


class FakeAutoencoder:
    """Enlarges the first three latent channels eight times; the other way, takes the corners of the patches."""

    decoded: ClassVar[list[int]] = []
    """Frames of each call since the last :meth:`load`."""

    @classmethod
    def load(cls, _model: str, **_options: Any) -> "FakeAutoencoder":
        cls.decoded = []
        return cls()

    def provenance(self) -> dict[str, Any]:
        return provenance()["latent"]

    def decode(self, latent: Tensor, num_frames: int) -> np.ndarray:
        assert latent.shape[1] == num_frames
        self.decoded.append(num_frames)
        pixels = latent[:3].permute(1, 2, 3, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()

    def encode(self, frames: np.ndarray, *, seed: str) -> Tensor:
        pixels = torch.from_numpy(frames[:, ::8, ::8]).permute(3, 0, 1, 2) / 127.5 - 1
        return torch.cat([pixels, torch.zeros_like(pixels[:1])])


def use_fake_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts them in the place of the real ones."""
    monkeypatch.setattr("shared.encoders.t5.TextEncoder", FakeTextEncoder)
    monkeypatch.setattr("shared.encoders.vae.VideoAutoencoder", FakeAutoencoder)
