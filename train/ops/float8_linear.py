# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Linear layers whose products are computed in 8 bits, but for the gradient of the weight.

Inputs and gradients are converted row by row as they come, weights by their outputs for the forward pass and by their
inputs for the gradient of those: each row has a scale of its own, and none is remembered from one step to the next. The
gradient of the weight, a sum over all tokens that the optimiser integrates, stays as precise as without: it is computed
from the inputs as they are, which are kept; what is in 8 bits is thrown away. (What torchao calls row-wise scaling with
a high-precision gradient of weights.)

Bias and its gradient are as :mod:`train.ops.linear` has them; a GELU behind a layer gives its result in 8 bits too, for
the layer after it. As there, a layer is one node of the graph. Where somebody looks on (see
:func:`train.ops.launching.launches_directly`), a product with its conversions is one operator, whose result selective
checkpointing can keep by name; a compiled graph is not broken.

Letters: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.ops.float8 import (
    Float8Rows,
    WithRows,
    bias_gelu_backward_rows,
    bias_gelu_rows,
    product,
    to_rows,
    to_rows_and_sums,
    transposed_to_rows,
)
from train.ops.launching import launches_directly


def _forward(x: Tensor, values: Tensor | None, scales: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = to_rows(x) if values is None or scales is None else Float8Rows(values, scales)
    return product(rows, to_rows(weight), bias, x.dtype)


def _backward(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, sums = to_rows_and_sums(grad)
    return product(rows, transposed_to_rows(weight), None, grad.dtype), sums


def _gelu_forward(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, rows = bias_gelu_rows(x, bias)
    return out, *rows


def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product_grad, rows, bias_grad = bias_gelu_backward_rows(grad, x, bias)
    return product(rows, transposed_to_rows(weight), None, grad.dtype), product_grad, bias_grad


_forward_op = torch.library.custom_op("latentmill_float8::linear", mutates_args=())(_forward)
_backward_op = torch.library.custom_op("latentmill_float8::linear_backward", mutates_args=())(_backward)
_gelu_forward_op = torch.library.custom_op("latentmill_float8::bias_gelu", mutates_args=())(_gelu_forward)
_gelu_backward_op = torch.library.custom_op("latentmill_float8::gelu_backward", mutates_args=())(_gelu_backward)


@_forward_op.register_fake
def _(x: Tensor, values: Tensor | None, scales: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@_backward_op.register_fake
def _(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty((grad.shape[0], weight.shape[1])), grad.new_empty((grad.shape[1],))


@_gelu_forward_op.register_fake
def _(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0],), dtype=torch.float32)
    return torch.empty_like(x), *rows


@_gelu_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad.new_empty((grad.shape[0], weight.shape[1])), torch.empty_like(x), torch.empty_like(bias)


def _seen(x: Tensor) -> bool:
    """Whether operators are to be called. On tensors without content, what they are made of is counted instead."""
    return not (launches_directly(x) or x.is_meta)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _weight_grad(product_grad: Tensor, x: Tensor) -> Tensor:
    x = _rows(x)
    if x.is_cuda or x.is_meta:
        return product_grad.t().mm(x)
    return product_grad.float().t().mm(x.float()).to(x.dtype)  # see train.ops.cpu_bfloat16


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor | None, scales: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight)
        out = (_forward_op if _seen(x) else _forward)(_rows(x), values, scales, weight, bias)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = _rows(grad)
        x_grad, bias_grad = (_backward_op if _seen(grad) else _backward)(grad, weight)
        weight_grad = None if x is None else _weight_grad(grad, x)
        return x_grad.view(ctx.x_shape), None, None, weight_grad, bias_grad


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor | None, scales: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.x_shape = x.shape
        seen = _seen(x)
        before_gelu = (_forward_op if seen else _forward)(_rows(x), values, scales, weight, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, bias, before_gelu)
        out, *rows = (_gelu_forward_op if seen else _gelu_forward)(before_gelu, bias)
        ctx.mark_non_differentiable(*rows)
        return out.view(*x.shape[:-1], -1), rows[0], rows[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_rows_grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before_gelu = ctx.saved_tensors
        grad = _rows(grad)
        grads = (_gelu_backward_op if _seen(grad) else _gelu_backward)(grad, before_gelu, bias, weight)
        x_grad, product_grad, bias_grad = grads
        weight_grad = None if x is None else _weight_grad(product_grad, x)
        return x_grad.view(ctx.x_shape), None, None, weight_grad, bias_grad


def _taken_apart(x: Tensor | WithRows) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (x.x, *x.rows) if isinstance(x, WithRows) else (x, None, None)


def float8_linear(
    x: Float[Tensor, "... I"] | WithRows, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "... O"]:
    """Returns ``x weight^T + bias``, computed in 8 bits.

    Args:
        x: In bfloat16 on a GPU, as are the others.
        weight: Its sides are multiples of :data:`train.ops.float8.MULTIPLE`.
        bias: Added in float32.
    """
    out: Tensor = _Linear.apply(*_taken_apart(x), weight, bias)
    return out


def float8_linear_gelu(
    x: Float[Tensor, "... I"] | WithRows, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> WithRows:
    """Returns ``GELU(x weight^T + bias)``, by the tanh formula, computed from a product in 8 bits; the arguments are
    those of :func:`float8_linear`."""
    out, *rows = _LinearGelu.apply(*_taken_apart(x), weight, bias)
    return WithRows(out, Float8Rows(*rows))
