"""The Triton kernels of bias and tanh-GELU: one pass forward, one backward, which sums the bias's gradient on its way.

GELU(x) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh(u)) / 2 (arXiv 1606.08415).

Letters: N rows, F width.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.registers import at_most
from train.ops.launching import Launch
from train.ops.partial_sums_kernels import add_partial_sums

COLUMNS, ROWS, WARPS = 128, 32, 4
"""A tile: 16 bytes of bfloat16 for each of 16 threads of a row, eight rows at a time."""
FORWARD_REGISTERS = 40
"""Triton 3.8 takes 51, which leave 9 programs on a multiprocessor, not 12."""
_PROGRAMS = 2112
"""About as many in the backward pass: sixteen for each of Hopper's 132 multiprocessors."""
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu(v):  # type: ignore[no-untyped-def]
    """GELU(v) of float32."""
    return v * tl.sigmoid(_TWICE_ROOT * v * (1 + _CUBIC * v * v))


@triton.jit
def gelu_slope(v):  # type: ignore[no-untyped-def]
    """The derivative of GELU at v, float32."""
    gate = tl.sigmoid(_TWICE_ROOT * v * (1 + _CUBIC * v * v))
    return gate + v * gate * (1 - gate) * (_TWICE_ROOT * (1 + 3 * _CUBIC * v * v))


@triton.jit
def _place(first, tile, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The offsets (ROWS, COLUMNS) of the ``tile`` of columns whose rows begin at ``first``, and which of them exist."""
    rows, columns = first + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    return rows[:, None].to(tl.int64) * F + columns[None, :], (rows < N)[:, None] & (columns < F)[None, :]


@triton.jit
def _load_bias(bias, tile, F, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    return tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, bias, out, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    tiles = tl.cdiv(F, COLUMNS)
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles * ROWS
    at, inside = _place(row, tile, N, F, ROWS, COLUMNS)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + _load_bias(bias, tile, F, COLUMNS)
    tl.store(out + at, gelu(v).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, x, bias, x_grad, sums, N, F, chunk_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    tile, chunk = tl.program_id(0), tl.program_id(1)
    b = _load_bias(bias, tile, F, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((chunk + 1) * chunk_rows, N)
    for first in range(chunk * chunk_rows, end, ROWS):
        at, inside = _place(first, tile, end, F, ROWS, COLUMNS)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        dx = (dy * gelu_slope(v)).to(x_grad.dtype.element_ty)
        tl.store(x_grad + at, dx, mask=inside)
        total += dx.to(tl.float32)  # as whoever reads it sees it
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + chunk.to(tl.int64) * F + columns, tl.sum(total, 0), mask=columns < F)


@lru_cache(maxsize=1024)
def _forward_launch(_device: torch.device, dtype: torch.dtype, N: int, F: int) -> Launch:
    programs = triton.cdiv(F, COLUMNS) * triton.cdiv(N, ROWS)  # along one axis: others take 65,535 at most
    limit = at_most(FORWARD_REGISTERS, triton.__version__) if dtype.itemsize == 2 else {}
    return Launch(_forward, (programs,), (N, F), (ROWS, COLUMNS), num_warps=WARPS, **limit)


@lru_cache(maxsize=1024)
def _backward_launch(_device: torch.device, _dtype: torch.dtype, N: int, F: int) -> tuple[Launch, int]:
    """Returns the launch, and how many programs share the rows of a column."""
    tiles = triton.cdiv(F, COLUMNS)
    chunk_rows = triton.cdiv(triton.cdiv(N, ROWS), max(1, _PROGRAMS // tiles)) * ROWS
    chunks = triton.cdiv(N, chunk_rows)
    return Launch(_backward, (tiles, chunks), (N, F, chunk_rows), (ROWS, COLUMNS), num_warps=WARPS), chunks


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Returns GELU(x + bias) of contiguous x (N, F) and bias (F,), of one type."""
    out = torch.empty_like(x)
    _forward_launch(x.device, x.dtype, *x.shape)(x, bias, out)
    return out


def backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the bias."""
    launch, chunks = _backward_launch(x.device, x.dtype, *x.shape)
    x_grad = torch.empty_like(x)
    sums = x.new_empty((1, chunks, x.shape[1]), dtype=torch.float32)
    launch(grad, x, bias, x_grad, sums)
    return x_grad, add_partial_sums(sums, torch.empty_like(bias))
