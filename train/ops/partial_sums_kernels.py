"""The Triton kernel that adds what the programs of another kernel summed, each for itself, in a fixed order."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.ops.launching import Launch

_TILE = 4096
"""Values that a program adds at a time."""


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    partial, out, N, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    tiles = tl.cdiv(width, COLUMNS)
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    start = partial + group * N * width + columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, N, ROWS):
        rows = first + tl.arange(0, ROWS)
        total += tl.load(
            start[None, :] + rows[:, None].to(tl.int64) * width, mask=(rows < N)[:, None] & inside[None, :], other=0.0
        )
    tl.store(out + group * width + columns, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@lru_cache(maxsize=1024)
def _launch(_device: torch.device, _dtype: torch.dtype, shape: tuple[int, int, int]) -> Launch:
    groups, num_partial, width = shape
    rows = min(64, triton.next_power_of_2(num_partial))
    columns = min(_TILE // rows, 1024)
    programs = triton.cdiv(width, columns) * groups  # along one axis: others take 65,535 at most
    return Launch(_add, (programs,), (num_partial, width), (rows, columns), num_warps=4)


def add_partial_sums(partial: Tensor, out: Tensor) -> Tensor:
    """Writes the sums over the second axis of ``partial`` (groups, N, width), float32, to ``out``, and returns that.

    Args:
        partial: Contiguous.
        out: Contiguous, groups * width values of any type.
    """
    _launch(out.device, out.dtype, tuple(partial.shape))(partial, out)
    return out
