# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Linear layers whose bias has its gradient from a kernel, and with a GELU behind them.

PyTorch's sum over as few columns as a layer is wide moves half of what an H100's memory can (1.3 TB/s), and a block has
as many such sums as linear layers. Where a GELU follows, the product goes without its bias: the GELU's kernel adds it,
and sums its gradient on the way back, so that no pass over memory is made for it. Products are PyTorch's, large ones by
an algorithm of our choice (:mod:`train.ops.products`); each layer is one node of the graph, in which PyTorch has four
or five.

Letters: I inputs, O outputs.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops.gelu import bias_gelu
from train.ops.launching import entry
from train.ops.products import linear_product, product
from train.ops.reference import Kernel, kernel_wanted

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight and bias."""


@cache
def _column_sums() -> ModuleType:
    from train.ops import column_sums_kernels

    return column_sums_kernels


@cache
def _gelu() -> ModuleType:
    from train.ops import gelu_kernels

    return gelu_kernels


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _keep(ctx: Any, x_shape: torch.Size, rows: Tensor, weight: Tensor, *others: Tensor) -> None:
    """Keeps what the gradients are computed from; of a frozen weight not the inputs, as PyTorch does."""
    ctx.x_shape = x_shape
    ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, *others)


def _grads(ctx: Any, product_grad: Tensor, rows: Tensor, weight: Tensor, bias_grad: Tensor | None) -> Grads:
    of_x, of_weight, _ = ctx.needs_input_grad
    return (
        product(product_grad, weight).view(ctx.x_shape) if of_x else None,
        product_grad.t().mm(rows) if of_weight else None,
        bias_grad,
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape, rows = x.shape, _rows(x)
        _keep(ctx, shape, rows, weight)
        return linear_product(rows, weight, bias).view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        rows, weight = ctx.saved_tensors
        grad = _rows(grad).contiguous()
        return _grads(ctx, grad, rows, weight, _column_sums().column_sums(grad) if ctx.needs_input_grad[2] else None)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape, rows = x.shape, _rows(x)
        products = linear_product(rows, weight)
        _keep(ctx, shape, rows, weight, bias, products)
        out: Tensor = _gelu().forward(products, bias)
        return out.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        rows, weight, bias, products = ctx.saved_tensors
        product_grad, bias_grad = _gelu().backward(_rows(grad).contiguous(), products, bias)
        return _grads(ctx, product_grad, rows, weight, bias_grad)


_linear, _linear_gelu = entry(_Linear), entry(_LinearGelu)


def _by_function(kernel: Kernel, x: Tensor, bias: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or x.is_meta) and kernel_wanted(kernel, x) and bias.dtype == x.dtype


def linear(
    x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "... O"]:
    """Returns ``x weight^T + bias``, computed on rows in two dimensions."""
    if _by_function("linear", x, bias):
        out: Tensor = _linear(x, weight, bias)
        return out
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


def linear_gelu(
    x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "... O"]:
    """Returns ``GELU(x weight^T + bias)``, by the tanh formula, computed on rows in two dimensions."""
    if _by_function("gelu", x, bias):
        out: Tensor = _linear_gelu(x, weight, bias)
        return out
    rows = x.flatten(0, -2)
    if kernel_wanted("gelu", x) and bias.dtype == x.dtype:
        out = bias_gelu(F.linear(rows, weight), bias)
    else:
        out = F.gelu(F.linear(rows, weight, bias), approximate="tanh")
    return out.view(*x.shape[:-1], -1)
