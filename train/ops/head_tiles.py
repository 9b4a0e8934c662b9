"""Tiles of heads for attention kernels: rows of a head's width, loaded, multiplied and stored in two parts.

Letters: R rows of a tile, P head width, A + C its two parts.
"""

import triton
import triton.language as tl


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
