"""The Triton kernels that convert to 8 bits, each in one pass: rows as they are, rows behind a bias and a GELU, rows
with the sums over them, GELU's gradient with the same, and the columns of a weight.

A program holds whole rows, so that it knows a row's greatest value before it writes: nothing is read twice. A weight's
columns are the exception; it is small enough for the second reading to come from the cache. Where rows are summed, the
next ones are loaded while some are converted (``cp.async``), so that few programs keep memory busy; but for wide ones
without a GELU, where that is slower.

Scales are powers of two, made of the bits of the greatest value: see :mod:`train.ops.float8`.

Letters: N rows, D their width, A + C its two parts, R rows at a time.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.registers import at_most
from train.ops import float8
from train.ops.float8 import Float8Rows, empty_rows
from train.ops.gelu_kernels import gelu, gelu_slope
from train.ops.launching import Launch
from train.ops.partial_sums_kernels import add_partial_sums
from train.ops.row_tiles import load_rows, load_vector, row_parts, store_rows, store_vector

WIDE = 2048
"""Rows that are wider are one to a program at a time."""
NARROW_ROWS, NARROW_WARPS, WIDE_ROWS, WIDE_WARPS = 2, 1, 1, 4


class Sharing(NamedTuple):
    """How programs share rows that are summed."""

    rows: int
    """At a time."""
    warps: int
    stages: int
    """Rows that are loaded or waited for at once, as many times :attr:`rows`."""
    programs: int
    """About as many; no more than are resident at once on Hopper's 132 multiprocessors, or some would wait for a second
    round."""
    registers: int
    """Of a thread, at most, so that all programs are resident."""
    most_width: int | None = None
    """Of rows of 2-byte values up to which Triton 3.6 keeps to that by itself and newer ones are held to it. None: all
    are, at any width."""


NARROW_SUMS = Sharing(rows=2, warps=2, stages=3, programs=1320, registers=96, most_width=1152)
WIDE_SUMS = Sharing(rows=1, warps=8, stages=1, programs=660, registers=48, most_width=4096)
WIDE_GELU = Sharing(rows=1, warps=16, stages=3, programs=396, registers=40)
COLUMNS, COLUMN_ROWS, COLUMN_WARPS = 16, 256, 8
"""A tile of a weight whose columns are converted: rows of 32 bytes are read, rows of 256 are written."""

_LEAST = tl.constexpr(float8.LEAST)
_EXPONENT_BITS = tl.constexpr(float8.EXPONENT_BITS)
_UP_TO_448 = tl.constexpr(float8.UP_TO_448)
_ONE_OVER_256 = tl.constexpr(float8.ONE_OVER_256)
_TWICE_ONE = tl.constexpr(254 << 23)
"""Bits of 2^k and of 2^-k add up to it."""


@triton.jit
def _scales(greatest):  # type: ignore[no-untyped-def]
    """The scales of rows whose greatest values are given, and one over each."""
    bits = tl.maximum(greatest, _LEAST).to(tl.int32, bitcast=True)
    bits = ((bits + _UP_TO_448) & _EXPONENT_BITS) - _ONE_OVER_256
    scale = tl.where(greatest < float("inf"), bits.to(tl.float32, bitcast=True), float("nan"))
    return scale, (-bits + _TWICE_ONE).to(tl.float32, bitcast=True)


@triton.jit
def store_converted(  # type: ignore[no-untyped-def]
    values, scales, row, a, c, inside, D: tl.constexpr, A: tl.constexpr, C: tl.constexpr
):
    """Writes rows (R, A) and (R, C) of float32, 0 beyond the width, in 8 bits; ``row`` (R,) says which they are."""
    greatest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(c), 1))
    scale, inverse = _scales(greatest)
    tl.store(scales + row, scale, mask=inside)
    store_rows(values + row.to(tl.int64) * D, a * inverse[:, None], c * inverse[:, None], inside, D, A, C)


@triton.jit
def _convert(  # type: ignore[no-untyped-def]
    x, bias, out, values, scales, N,
    D: tl.constexpr, A: tl.constexpr, C: tl.constexpr, R: tl.constexpr, HAS_GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < N
    offset = row.to(tl.int64) * D
    a, c = load_rows(x + offset, inside, D, A, C)
    if HAS_GELU:
        bias_a, bias_c = load_vector(bias, D, A, C)
        dtype = out.dtype.element_ty  # what is converted is what others read
        a, c = gelu(a + bias_a[None, :]).to(dtype).to(tl.float32), gelu(c + bias_c[None, :]).to(dtype).to(tl.float32)
        store_rows(out + offset, a, c, inside, D, A, C)
    store_converted(values, scales, row, a, c, inside, D, A, C)


@triton.jit
def _convert_and_sum(  # type: ignore[no-untyped-def]
    grad, x, bias, x_grad, values, scales, sums, N, chunk_rows,
    D: tl.constexpr, A: tl.constexpr, C: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, HAS_GELU: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    end = tl.minimum((chunk + 1) * chunk_rows, N)
    sum_a, sum_c = tl.zeros((R, A), tl.float32), tl.zeros((R, C), tl.float32)
    for first in tl.range(chunk * chunk_rows, end, R, num_stages=STAGES):
        row = first + tl.arange(0, R)
        inside = row < end
        offset = row.to(tl.int64) * D
        a, c = load_rows(grad + offset, inside, D, A, C)
        if HAS_GELU:
            x_a, x_c = load_rows(x + offset, inside, D, A, C)
            bias_a, bias_c = load_vector(bias, D, A, C)
            dtype = x_grad.dtype.element_ty  # what is summed and converted is what others read
            a = (a * gelu_slope(x_a + bias_a[None, :])).to(dtype).to(tl.float32)
            c = (c * gelu_slope(x_c + bias_c[None, :])).to(dtype).to(tl.float32)
            store_rows(x_grad + offset, a, c, inside, D, A, C)
        sum_a += a
        sum_c += c
        store_converted(values, scales, row, a, c, inside, D, A, C)
    store_vector(sums + chunk.to(tl.int64) * D, tl.sum(sum_a, 0), tl.sum(sum_c, 0), D, A, C)


@triton.jit
def _convert_columns(  # type: ignore[no-untyped-def]
    weight, values, scales, outputs, inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inputs
    greatest = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, outputs, ROWS):
        row = first + tl.arange(0, ROWS)
        at = weight + row[:, None].to(tl.int64) * inputs + column[None, :]
        w = tl.load(at, mask=(row < outputs)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.abs(w))
    scale, inverse = _scales(tl.max(greatest, 0))
    tl.store(scales + column, scale, mask=inside)
    for first in range(0, outputs, ROWS):
        row = first + tl.arange(0, ROWS)
        at = weight + row[:, None].to(tl.int64) * inputs + column[None, :]
        w = tl.load(at, mask=(row < outputs)[:, None] & inside[None, :], other=0.0).to(tl.float32) * inverse[None, :]
        to = values + column[:, None].to(tl.int64) * outputs + row[None, :]
        tl.store(to, tl.trans(w).to(values.dtype.element_ty), mask=inside[:, None] & (row < outputs)[None, :])


@lru_cache(maxsize=1024)
def _convert_launch(_device: torch.device, _dtype: torch.dtype, N: int, D: int, has_gelu: bool) -> Launch:
    rows, warps = (NARROW_ROWS, NARROW_WARPS) if D <= WIDE else (WIDE_ROWS, WIDE_WARPS)
    return Launch(_convert, (triton.cdiv(N, rows),), (N,), (D, *row_parts(D), rows, has_gelu), num_warps=warps)


@lru_cache(maxsize=1024)
def _sums_launch(_device: torch.device, dtype: torch.dtype, N: int, D: int, has_gelu: bool) -> tuple[Launch, int]:
    """Returns the launch, and how many programs share the rows."""
    sharing = NARROW_SUMS if D <= WIDE else WIDE_GELU if has_gelu else WIDE_SUMS
    chunk_rows = triton.cdiv(triton.cdiv(N, sharing.rows), sharing.programs) * sharing.rows
    chunks = triton.cdiv(N, chunk_rows)
    options = {"num_warps": sharing.warps}
    if sharing.most_width is None:
        options["maxnreg"] = sharing.registers
    elif sharing.most_width >= D and dtype.itemsize == 2 and not has_gelu:
        options |= at_most(sharing.registers, triton.__version__)
    constants = (D, *row_parts(D), sharing.rows, sharing.stages, has_gelu)
    return Launch(_convert_and_sum, (chunks,), (N, chunk_rows), constants, **options), chunks


@lru_cache(maxsize=1024)
def _columns_launch(_device: torch.device, _dtype: torch.dtype, outputs: int, inputs: int) -> Launch:
    return Launch(
        _convert_columns,
        (triton.cdiv(inputs, COLUMNS),),
        (outputs, inputs),
        (COLUMN_ROWS, COLUMNS),
        num_warps=COLUMN_WARPS,
    )


def to_rows(x: Tensor) -> Float8Rows:
    """Returns contiguous x (N, D) in 8 bits."""
    rows = empty_rows(x, *x.shape)
    _convert_launch(x.device, x.dtype, *x.shape, False)(x, None, None, *rows)
    return rows


def bias_gelu_rows(x: Tensor, bias: Tensor) -> tuple[Tensor, Float8Rows]:
    """Returns GELU(x + bias) of contiguous x (N, D) and bias (D,), of one type, and the same in 8 bits."""
    out, rows = torch.empty_like(x), empty_rows(x, *x.shape)
    _convert_launch(x.device, x.dtype, *x.shape, True)(x, bias, out, *rows)
    return out, rows


def to_rows_and_sums(x: Tensor) -> tuple[Float8Rows, Tensor]:
    """Returns contiguous x (N, D) in 8 bits, and its sums (D,) over the rows, in its type."""
    launch, chunks = _sums_launch(x.device, x.dtype, *x.shape, False)
    rows = empty_rows(x, *x.shape)
    sums = x.new_empty((1, chunks, x.shape[1]), dtype=torch.float32)
    launch(x, None, None, None, *rows, sums)
    return rows, add_partial_sums(sums, x.new_empty((x.shape[1],)))


def bias_gelu_backward_rows(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Float8Rows, Tensor]:
    """Returns the gradient of x (N, D), the same in 8 bits, and that of the bias; all that is given is contiguous."""
    launch, chunks = _sums_launch(x.device, x.dtype, *x.shape, True)
    x_grad, rows = torch.empty_like(x), empty_rows(x, *x.shape)
    sums = x.new_empty((1, chunks, x.shape[1]), dtype=torch.float32)
    launch(grad, x, bias, x_grad, *rows, sums)
    return x_grad, rows, add_partial_sums(sums, torch.empty_like(bias))


def transposed_to_rows(weight: Tensor) -> Float8Rows:
    """Returns the transpose (I, O) of a contiguous weight (O, I) in 8 bits."""
    outputs, inputs = weight.shape
    rows = empty_rows(weight, inputs, outputs)
    _columns_launch(weight.device, weight.dtype, outputs, inputs)(weight, *rows)
    return rows
