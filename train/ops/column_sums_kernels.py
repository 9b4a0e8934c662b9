"""The Triton kernel of sums over rows, which is what a linear layer's bias has for a gradient.

Each program sums a share of the rows of some columns; the few sums are added in a fixed order by a second kernel. One
kernel whose programs go through all rows would do, but few columns give work to few multiprocessors: of 1,152, at 64
bytes a program, 36 of 132, which move 1.4 TB/s.

Letters: N rows, F width.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.ops.launching import Launch
from train.ops.partial_sums_kernels import add_partial_sums

COLUMNS, ROWS, WARPS = 128, 32, 4
"""Of a tile: 16 bytes of bfloat16 for each of 16 threads of a row, eight rows at a time."""
_PROGRAMS = 1056
"""About as many: eight for each of Hopper's 132 multiprocessors, all of which it holds at once."""


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]
    x, sums, N, F, share_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    share = tl.program_id(1)
    end = tl.minimum((share + 1) * share_rows, N)
    for first in range(share * share_rows, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = x + rows[:, None].to(tl.int64) * F + columns[None, :]
        total += tl.load(at, mask=(rows < end)[:, None] & (columns < F)[None, :], other=0.0).to(tl.float32)
    tl.store(sums + share.to(tl.int64) * F + columns, tl.sum(total, 0), mask=columns < F)


@lru_cache(maxsize=1024)
def _launch(_device: torch.device, _dtype: torch.dtype, N: int, F: int) -> tuple[Launch, int]:
    """Returns the launch, and how many programs share the rows of a column."""
    tiles = triton.cdiv(F, COLUMNS)
    share_rows = triton.cdiv(triton.cdiv(N, ROWS), max(1, _PROGRAMS // tiles)) * ROWS
    shares = triton.cdiv(N, share_rows)
    return Launch(_column_sums, (tiles, shares), (N, F, share_rows), (ROWS, COLUMNS), num_warps=WARPS), shares


def column_sums(x: Tensor) -> Tensor:
    """Returns the sums (F,) over the rows of contiguous x (N, F): in float32, rounded to its type."""
    N, F = x.shape
    launch, shares = _launch(x.device, x.dtype, N, F)
    sums = x.new_empty((1, shares, F), dtype=torch.float32)
    launch(x, sums)
    return add_partial_sums(sums, x.new_empty((F,)))
