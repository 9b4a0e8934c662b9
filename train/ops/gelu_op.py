"""Bias and tanh-GELU as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, and on tensors without content it has the shapes, and
keeps the memory, that it has on a GPU. Triton is imported on a GPU only.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@cache
def _kernels() -> ModuleType:
    from train.ops import gelu_kernels

    return gelu_kernels


@torch.library.custom_op("latentmill_gelu::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = _kernels().forward(x, bias)
    return out


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("latentmill_gelu::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _kernels().backward(grad, x, bias)
    return grads


@_bias_gelu_backward.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _bias_gelu_backward(grad.contiguous(), *ctx.saved_tensors)
    return grads


_bias_gelu.register_autograd(_differentiate, setup_context=_keep)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Returns GELU(x + bias), by its tanh formula, of x (N, F) and bias (F,) of one type."""
    out: Tensor = _bias_gelu(x.contiguous(), bias.contiguous())
    return out
