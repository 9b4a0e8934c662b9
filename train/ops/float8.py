# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Matrices in 8 bits with a scale for each row, and products of them.

The format is e4m3 (arXiv 2209.05433): 4 bits of exponent, 3 of mantissa, up to 448. Each row is scaled by the smallest
power of two with which its greatest value fits: scaling is then exact, what is lost is the mantissa's bits alone. On a
GPU the conversions are Triton kernels (``float8_kernels``) and the product is PyTorch's, accumulated as the units do it
fastest; elsewhere, and as what the kernels are tested against, all is plain PyTorch and products are float32's.

Letters: N rows, K columns; O outputs and I inputs of a weight.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MULTIPLE = 16
"""Of which the widths of a product's matrices must be multiples: the units load as many bytes at a time."""

LEAST = 2.0**-100
"""Below it, a row's greatest value is taken for this: so that no scale, nor one over it, leaves float32's range."""
EXPONENT_BITS = 0x7F800000
UP_TO_448 = 0x001FFFFF
"""448 is 1.75 times a power of two: this, added to a float32's bits, is carried into its exponent above 1.75 of it."""
ONE_OVER_256 = 8 << 23
"""By how much the bits of 2^k are above those of 2^k / 256; 448 lies between 256 and 512."""


class Float8Rows(NamedTuple):
    """A matrix whose row n is ``values[n] * scales[n]``."""

    values: Tensor
    """(N, K) e4m3, contiguous."""
    scales: Tensor
    """(N,) float32: powers of two, or not a number where the row had no finite greatest value."""

    def to_float(self) -> Float[Tensor, "N K"]:
        """Returns the matrix in float32."""
        return self.values.float() * self.scales[:, None]


class WithRows(NamedTuple):
    """A tensor, and the same in 8 bits for the product that reads it next."""

    x: Tensor
    """(..., K)."""
    rows: Float8Rows
    """Its rows."""


def with_rows(x: Float[Tensor, "... K"], rows: Float8Rows | None) -> "Tensor | WithRows":
    """Returns a tensor with what it is in 8 bits, if that is there."""
    return x if rows is None else WithRows(x, rows)


@cache
def _kernels() -> ModuleType:
    from train.ops import float8_kernels

    return float8_kernels


def empty_rows(x: Tensor, num_rows: int, width: int) -> Float8Rows:
    """Returns room for a matrix in 8 bits on the device of x."""
    return Float8Rows(
        x.new_empty((num_rows, width), dtype=torch.float8_e4m3fn), x.new_empty((num_rows,), dtype=torch.float32)
    )


def _by_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def rows_reference(x: Float[Tensor, "N K"]) -> Float8Rows:
    """Returns :func:`to_rows` in plain PyTorch."""
    x = x.float()
    greatest = x.abs().amax(1)
    bits = greatest.clamp(min=LEAST).view(torch.int32)
    scales = (((bits + UP_TO_448) & EXPONENT_BITS) - ONE_OVER_256).view(torch.float32)
    scales = torch.where(greatest.isfinite(), scales, torch.nan)
    return Float8Rows((x / scales[:, None]).to(torch.float8_e4m3fn), scales)


def to_rows(x: Float[Tensor, "N K"]) -> Float8Rows:
    """Returns a matrix in 8 bits."""
    if x.is_meta:
        return empty_rows(x, *x.shape)
    if not _by_kernel(x):
        return rows_reference(x)
    rows: Float8Rows = _kernels().to_rows(x.contiguous())
    return rows


def to_rows_and_sums(x: Float[Tensor, "N K"]) -> tuple[Float8Rows, Float[Tensor, " K"]]:
    """Returns a matrix in 8 bits and, of the matrix before that, the sums over its rows, in one pass on a GPU."""
    if x.is_meta:
        return empty_rows(x, *x.shape), x.new_empty((x.shape[1],))
    if not _by_kernel(x):
        return rows_reference(x), x.float().sum(0).to(x.dtype)
    both: tuple[Float8Rows, Tensor] = _kernels().to_rows_and_sums(x.contiguous())
    return both


def transposed_to_rows(weight: Float[Tensor, "O I"]) -> Float8Rows:
    """Returns the transpose (I, O) of a matrix in 8 bits."""
    if weight.is_meta:
        return empty_rows(weight, weight.shape[1], weight.shape[0])
    if not _by_kernel(weight):
        return rows_reference(weight.t())
    rows: Float8Rows = _kernels().transposed_to_rows(weight.contiguous())
    return rows


def bias_gelu_rows(x: Float[Tensor, "N K"], bias: Float[Tensor, " K"]) -> tuple[Float[Tensor, "N K"], Float8Rows]:
    """Returns ``GELU(x + bias)``, by the tanh formula, and the same in 8 bits, in one pass on a GPU."""
    if x.is_meta:
        return torch.empty_like(x), empty_rows(x, *x.shape)
    if not _by_kernel(x):
        out = F.gelu(x.float() + bias.float(), approximate="tanh").to(x.dtype)
        return out, rows_reference(out)
    both: tuple[Tensor, Float8Rows] = _kernels().bias_gelu_rows(x, bias)
    return both


def bias_gelu_backward_rows(
    grad: Float[Tensor, "N K"], x: Float[Tensor, "N K"], bias: Float[Tensor, " K"]
) -> tuple[Float[Tensor, "N K"], Float8Rows, Float[Tensor, " K"]]:
    """Returns the gradient of x, the same in 8 bits, and that of the bias.

    Args:
        grad: Of :func:`bias_gelu_rows`'s first result; contiguous.
        x: As that was given.
        bias: Likewise.
    """
    if x.is_meta:
        return torch.empty_like(x), empty_rows(x, *x.shape), torch.empty_like(bias)
    if not _by_kernel(x):
        of_x = torch.ops.aten.gelu_backward(grad.float(), x.float() + bias.float(), approximate="tanh").to(x.dtype)
        return of_x, *to_rows_and_sums(of_x)
    grads: tuple[Tensor, Float8Rows, Tensor] = _kernels().bias_gelu_backward_rows(grad, x, bias)
    return grads


def product(a: Float8Rows, b: Float8Rows, bias: Float[Tensor, " M"] | None, dtype: torch.dtype) -> Float[Tensor, "N M"]:
    """Returns ``a b^T + bias``.

    Args:
        a: (N, K).
        b: (M, K).
        bias: Of ``dtype``.
        dtype: Of the result; on a GPU bfloat16.
    """
    if a.values.is_cuda or a.values.is_meta:
        return torch._scaled_mm(
            a.values,
            b.values.t(),
            scale_a=a.scales[:, None],
            scale_b=b.scales[None],
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,
        )
    return F.linear(a.to_float(), b.to_float(), None if bias is None else bias.float()).to(dtype)
