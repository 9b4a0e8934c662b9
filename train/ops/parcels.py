# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Tokens in parcels: (C, T, B, s, D) for (B, T, S, D), the places of a frame in C parcels of s, one behind the other.

So they lie when whoever moves them sends each parcel elsewhere: what writes tokens anyway can write them so, and what
reads them read them so, and nobody has to copy them. How many dimensions tokens have says how they lie.

Letters: B batch, T frames, S tokens of a frame, C parcels, s tokens of a frame in a parcel, D width.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "B T S D"] | Float[Tensor, "C T B s D"]
"""In order, or in parcels."""


def ordered_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns (B, T, S, D) of the shape of tokens in either order."""
    if len(shape) == 4:
        return tuple(shape)
    C, T, B, s, D = shape
    return B, T, C * s, D


def parcelled_shape(shape: Sequence[int], parcels: int) -> tuple[int, ...]:
    """Returns (C, T, B, s, D) of (B, T, S, D)."""
    B, T, S, D = shape
    assert S % parcels == 0
    return parcels, T, B, S // parcels, D


def to_parcels(x: Float[Tensor, "B T S D"], parcels: int) -> Float[Tensor, "C T B s D"]:
    """Returns tokens in parcels, copied."""
    return x.unflatten(2, (parcels, -1)).permute(2, 1, 0, 3, 4).contiguous()


def to_order(x: Tokens) -> Float[Tensor, "B T S D"]:
    """Returns tokens of either order as (B, T, S, D), copied if they lay in parcels."""
    return x if x.ndim == 4 else x.permute(2, 1, 0, 3, 4).flatten(2, 3)
