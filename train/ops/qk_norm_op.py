"""RMSNorm of packed queries and keys as operators of PyTorch's, and the gradient of both.

PyTorch knows the operators by name: they do not break a compiled graph, and on tensors without content they have the
shapes that they have on a GPU. Where nobody asks for that, the kernels are launched without them. Values go through as
a view, which no operator may return: so the node of the graph lies around the operators, and takes the gradients of all
three for one of the packed tensor. Triton is imported on a GPU only.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from train.ops.launching import launches_directly

RMS_NORM_EPS = 1e-6


@cache
def _kernels() -> ModuleType:
    from train.ops import qk_norm_kernels

    return qk_norm_kernels


@torch.library.custom_op("latentmill_qk_norm::qk_norm", mutates_args=())
def _qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    normed: tuple[Tensor, Tensor] = _kernels().forward(qkv, q_weight, k_weight)
    return normed


@_qk_norm.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    N, _, H, P = qkv.shape
    return qkv.new_empty(N, H, P), qkv.new_empty(N, H, P)


@torch.library.custom_op("latentmill_qk_norm::qk_norm_backward", mutates_args=())
def _qk_norm_backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _kernels().backward(q_grad, k_grad, v_grad, qkv, q_weight, k_weight)
    return grads


@_qk_norm_backward.register_fake
def _(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32)


class _QkNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, q_weight, k_weight)
        forward = _kernels().forward if launches_directly(qkv) else _qk_norm
        q, k = forward(qkv, q_weight, k_weight)
        return q, k, qkv[:, 2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, q_weight, k_weight = ctx.saved_tensors
        backward = _kernels().backward if launches_directly(grads[0]) else _qk_norm_backward
        grad, of_weights = backward(*map(_by_rows, grads), qkv, q_weight, k_weight)
        return grad, of_weights[0].to(q_weight.dtype), of_weights[1].to(k_weight.dtype)


def _by_rows(grad: Tensor) -> Tensor:
    """Returns a gradient (N, H, P) in which the heads of a token are neighbours; tokens may lie apart."""
    return grad if grad.stride()[1:] == (grad.shape[2], 1) else grad.contiguous()


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what :func:`train.ops.qk_norm.qk_norm` does, (N, H, P) each, of qkv (N, 3, H, P)."""
    normed: tuple[Tensor, Tensor, Tensor] = _QkNorm.apply(qkv.contiguous(), q_weight, k_weight)
    return normed
