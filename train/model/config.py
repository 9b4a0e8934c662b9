"""What determines a model, checked, and free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from shared.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What every diffusion transformer is determined by. The names are those of the published configurations."""

    input_size: tuple[int, int, int] = (16, 32, 32)
    """Latent frames, rows and columns that sampling takes where no size is given. Others work in the same model."""
    in_channels: int = 4
    """Channels of the latent."""
    hidden_size: int = 1152
    """Width of a token; a multiple of 4 and of num_heads."""
    depth: int = 28
    """Blocks; of STDiT3, pairs of blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, in token widths."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    pred_sigma: bool = True
    """Predict the variance too: twice as many output channels."""
    caption_channels: int = 4096
    """Channels of a caption token's embedding."""
    model_max_length: int = 120
    """Most caption tokens."""
    class_dropout_prob: float = 0.1
    """How often training replaces the caption by the null caption. 0 leaves the model without guidance."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise InputError(f"mlp_ratio={self.mlp_ratio}: expected a number of at least 1 / {self.hidden_size}")
        for name in ("input_size", "patch_size"):
            if len(getattr(self, name)) != 3 or min(getattr(self, name)) < 1:
                raise InputError(f"{name}={list(getattr(self, name))}: expected three numbers of at least 1")
        if not 0 <= self.class_dropout_prob < 1:
            raise InputError(f"class_dropout_prob={self.class_dropout_prob}: expected 0 <= p < 1")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise InputError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}, and of 4 for the "
                "positions"
            )

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice those of the input if the variance is predicted."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def normalises_queries(self) -> bool:
        """Whether attention among tokens normalises queries and keys."""
        return False

    @property
    def patch_values(self) -> int:
        """Values that the output has for one token."""
        return self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * self.out_channels

    def grid(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the tokens along frames, rows and columns of a latent of ``size``, which is padded to the patch.

        Raises:
            InputError: if the size is empty.
        """
        if min(size) < 1:
            raise InputError(f"latent of {'x'.join(map(str, size))} frames, rows and columns: expected at least 1 each")
        frames, rows, columns = (-(-n // p) for n, p in zip(size, self.patch_size, strict=True))
        return frames, rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledPositionsConfig(ModelConfig):
    """A model with fixed positions whose coordinates are divided by a scale."""

    space_scale: float | None = 1.0
    """Divides spatial coordinates: 0.5 at 256 pixels, 1.0 at 512. None takes it from the size at hand, so that one run
    may hold both."""
    time_scale: float | None = 1.0
    """Divides temporal coordinates: 1.0 at 16 frames, 2/3 at 64. None takes it from the size at hand."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)  # slots make a new class, which super() does not know
        for name in ("space_scale", "time_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value}: expected more than 0, or None")

    def space_scale_of(self, rows: int, columns: int) -> float:
        """Returns the scale of a frame of so many tokens; by size, it is 0.5 at 16x16 tokens and 1.0 at 32x32.

        Those are 256 and 512 pixels for an autoencoder of 8 pixels a value and patches of 2.
        """
        return (rows * columns) ** 0.5 / 32 if self.space_scale is None else self.space_scale

    def time_scale_of(self, frames: int) -> float:
        """Returns the scale of so many frames; by size, a power law through the published 1.0 at 16 and 2/3 at 64.

        It stands still outside of those.
        """
        if self.time_scale is not None:
            return self.time_scale
        return (min(max(frames, 16), 64) / 16) ** -0.2924812503605781  # log(2/3) / log(64/16)


@dataclass(frozen=True, kw_only=True, slots=True)
class STDiTConfig(ScaledPositionsConfig):
    """What determines an STDiT (Open-Sora v1.0)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class STDiT3Config(ModelConfig):
    """What determines an STDiT3 (Open-Sora v1.2)."""

    model_max_length: int = 300
    """Most caption tokens."""
    input_sq_size: int = 512
    """Side of the square, in pixels, at which spatial coordinates are not scaled."""
    qk_norm: bool = True
    """Normalise queries and keys."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)  # slots make a new class, which super() does not know
        if self.input_sq_size < 1:
            raise InputError(f"input_sq_size={self.input_sq_size}: expected at least 1")
        if self.head_size % 2:
            raise InputError(
                f"hidden_size={self.hidden_size} gives num_heads={self.num_heads} heads of {self.head_size}: expected "
                "an even width, for rotary positions"
            )

    @property
    def normalises_queries(self) -> bool:
        """Whether attention among tokens normalises queries and keys."""
        return self.qk_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig(ScaledPositionsConfig):
    """What determines a DiT: of videos with captions, or of images with class labels."""

    num_classes: int | None = None
    """Classes of the labels that condition images; None is for captions."""

    def __post_init__(self) -> None:
        ScaledPositionsConfig.__post_init__(self)  # slots make a new class, which super() does not know
        if self.num_classes is not None and self.num_classes < 1:
            raise InputError(f"num_classes={self.num_classes}: expected at least 1, or None for captions")


_NUMBER_OR_NONE: dict[str, type] = {"space_scale": float, "time_scale": float, "num_classes": int}

Config = TypeVar("Config", bound=ModelConfig)


def config_from_values(values: Mapping[str, Any], base: Config) -> Config:
    """Returns ``base`` with ``values`` put in, as read from JSON.

    Raises:
        InputError: for an unknown name or a value of the wrong kind.
    """
    known = {field.name: getattr(base, field.name) for field in fields(base)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"unknown model setting {name!r}: choose from {', '.join(known)}")
        kind = _NUMBER_OR_NONE.get(name, type(known[name]))
        if isinstance(value, list):
            value = tuple(value)
        if kind is float and type(value) is int:
            value = float(value)
        fits = type(value) is kind or (value is None and name in _NUMBER_OR_NONE)
        if not fits or (type(value) is tuple and any(type(item) is not int for item in value)):
            raise InputError(f"model setting {name}={value!r}: expected a value like {known[name]!r}")
        known[name] = value
    return type(base)(**known)
