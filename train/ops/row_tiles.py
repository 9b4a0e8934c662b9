"""A whole row in one Triton program, cut into two powers of two: 1152 is 1024 and 128.

A tile of 2048 would leave 44 % of its lanes idle.

Letters: D width, A + C its two parts; R rows at a time.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(at, rows_inside, D: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows (R, A) and (R, C) in float32; ``at`` (R,) points to where they begin."""
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    a = tl.load(at[:, None] + left[None, :], mask=rows_inside[:, None], other=0.0)
    c = tl.load(at[:, None] + right[None, :], mask=rows_inside[:, None] & (right < D)[None, :], other=0.0)
    return a.to(tl.float32), c.to(tl.float32)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    at, a, c, rows_inside, D: tl.constexpr, A: tl.constexpr, C: tl.constexpr
):
    """Writes rows (R, A) and (R, C) to where ``at`` (R,) points, in its type."""
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    dtype = at.dtype.element_ty
    tl.store(at[:, None] + left[None, :], a.to(dtype), mask=rows_inside[:, None])
    tl.store(at[:, None] + right[None, :], c.to(dtype), mask=rows_inside[:, None] & (right < D)[None, :])


@triton.jit
def load_vector(at, D: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row (A,) and (C,) in float32."""
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    return tl.load(at + left).to(tl.float32), tl.load(at + right, mask=right < D, other=0.0).to(tl.float32)


@triton.jit
def store_vector(at, a, c, D: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes one row (A,) and (C,), in the type of ``at``."""
    left, right = tl.arange(0, A), A + tl.arange(0, C)
    tl.store(at + left, a.to(at.dtype.element_ty))
    tl.store(at + right, c.to(at.dtype.element_ty), mask=right < D)


def row_parts(width: int) -> tuple[int, int]:
    """Returns A, the largest power of two below a width of at least 2, and C, a power of two that holds the rest."""
    left = 1 << ((width - 1).bit_length() - 1)
    return left, triton.next_power_of_2(width - left)
