"""The Triton kernel of sums over rows, which is what a linear layer's bias has for a gradient.

A program goes through all rows of a few columns, so that there is one launch and the order of the sums is fixed. The
widest loads that these columns allow are in flight at all times; that takes few multiprocessors to use the memory.

Letters: N rows, F width.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.ops.launching import Launch

COLUMNS, ROWS, WARPS = 32, 1024, 32
"""Of a tile: 64 bytes of bfloat16 a row are what memory is read by."""


@triton.jit
def _column_sums(x, out, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, N, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = x + rows[:, None].to(tl.int64) * F + columns[None, :]
        total += tl.load(at, mask=(rows < N)[:, None] & (columns < F)[None, :], other=0.0).to(tl.float32)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=columns < F)


@lru_cache(maxsize=1024)
def _launch(_device: torch.device, _dtype: torch.dtype, N: int, F: int) -> Launch:
    return Launch(_column_sums, (triton.cdiv(F, COLUMNS),), (N, F), (ROWS, COLUMNS), num_warps=WARPS)


def column_sums(x: Tensor) -> Tensor:
    """Returns the sums (F,) over the rows of contiguous x (N, F): in float32, rounded to its type."""
    N, F = x.shape
    out = x.new_empty((F,))
    _launch(x.device, x.dtype, N, F)(x, out)
    return out
