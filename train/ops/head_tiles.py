"""Tiles of heads for attention kernels: rows of a head's width, loaded, multiplied and stored in two parts.

A head's width is cut into two powers of two (72 is 64 and 8 of 16): a tile of 128 would leave 44 % of its lanes idle.

Letters: R rows of a tile, P head width, A + C its two parts.
"""

import torch

from train.ops.triton_names import tl, triton


def fits_tiles(head_width: int) -> bool:
    """Whether heads of that width can be cut so that products take both parts, and rows begin at 16 bytes."""
    return 16 < head_width <= 128 and head_width % 8 == 0


def head_parts(head_width: int) -> tuple[int, int]:
    """Returns the widths of the tiles that hold the two parts: the largest power of two below, and the rest."""
    left = 1 << ((head_width - 1).bit_length() - 1)
    return left, max(16, triton.next_power_of_2(head_width - left))


def precision(dtype: torch.dtype) -> str:
    """Returns how products of a dtype are computed: float32 ones exactly."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, to, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, acc=to, input_precision=PRECISION)


@triton.jit
def load_rows(at, inside, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    a = tl.load(at[:, None] + left[None, :], mask=inside[:, None], other=0.0)
    c = tl.load(at[:, None] + right[None, :], mask=inside[:, None] & (right < P)[None, :], other=0.0)
    return a, c


@triton.jit
def store_rows(at, a, c, inside, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    dtype = at.dtype.element_ty
    tl.store(at[:, None] + left[None, :], a.to(dtype), mask=inside[:, None])
    tl.store(at[:, None] + right[None, :], c.to(dtype), mask=inside[:, None] & (right < P)[None, :])
