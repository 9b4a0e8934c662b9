"""What determines a model, checked, and free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class STDiTConfig:
    """What determines an STDiT. The names are those of the published configuration."""

    input_size: tuple[int, int, int] = (16, 32, 32)
    """Latent frames, rows and columns that sampling takes where no size is given. Others work in the same model."""
    in_channels: int = 4
    """Channels of the latent."""
    hidden_size: int = 1152
    """Width of a token; a multiple of 4 and of num_heads."""
    depth: int = 28
    """Blocks."""
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
    space_scale: float = 1.0
    """Divides spatial coordinates: 0.5 at 256 pixels, 1.0 at 512."""
    time_scale: float = 1.0
    """Divides temporal coordinates: 1.0 at 16 frames, 2/3 at 64."""
    class_dropout_prob: float = 0.1
    """How often training replaces the caption by the null caption. 0 leaves the model without guidance."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("mlp_ratio", "space_scale", "time_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: expected more than 0")
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

    def grid(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the tokens along frames, rows and columns of a latent of ``size``.

        Raises:
            InputError: if the patch does not divide the size.
        """
        if any(n < p or n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise InputError(
                f"latent of {'x'.join(map(str, size))} frames, rows and columns is not divisible by the patch of "
                f"{'x'.join(map(str, self.patch_size))}: use sizes that are"
            )
        frames, rows, columns = (n // p for n, p in zip(size, self.patch_size, strict=True))
        return frames, rows, columns


def config_from_values(values: Mapping[str, Any], base: STDiTConfig) -> STDiTConfig:
    """Returns ``base`` with ``values`` put in, as read from JSON.

    Raises:
        InputError: for an unknown name or a value of the wrong kind.
    """
    known = {name: getattr(base, name) for name in STDiTConfig.__dataclass_fields__}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"unknown model setting {name!r}: choose from {', '.join(known)}")
        default = known[name]
        if isinstance(value, list):
            value = tuple(value)
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default) or (type(value) is tuple and any(type(item) is not int for item in value)):
            raise InputError(f"model setting {name}={value!r}: expected a value like {default!r}")
        known[name] = value
    return STDiTConfig(**known)
