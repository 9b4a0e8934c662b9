"""Attention along time as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Where nobody asks for that, the
kernels are launched without the operator. Triton is imported on a GPU only.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from train.ops.head_parts import fits_tiles
from train.ops.launching import entry, launches_directly

MOST_FRAMES = 64
"""The longest sequences that the kernels take: a tile holds whole ones."""


def takes(frames: int, head_width: int) -> bool:
    """Whether the kernels can compute sequences of that length and width."""
    return frames <= MOST_FRAMES and fits_tiles(head_width)


@cache
def _kernels() -> ModuleType:
    from train.ops import time_attention_kernels

    return time_attention_kernels


@torch.library.custom_op("latentmill_attention::time_attention", mutates_args=())
def _time_attention(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    out: Tensor = _kernels().forward(qkv, q_norm, k_norm, cosines, sines)
    return out


@_time_attention.register_fake
def _(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    B, T, S, _, H, P = qkv.shape
    return qkv.new_empty(B, T, S, H, P)


@torch.library.custom_op("latentmill_attention::time_attention_backward", mutates_args=())
def _time_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
) -> tuple[Tensor, Tensor]:
    qkv_grad, norm_grads = _kernels().backward(grad, qkv, q_norm, k_norm, cosines, sines)
    return qkv_grad, qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32) if norm_grads is None else norm_grads


@_time_attention_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_norm, k_norm, cosines, sines = ctx.saved_tensors
    backward = _kernels().backward if launches_directly(grad) else _time_attention_backward
    qkv_grad, norms = backward(grad.contiguous(), qkv, q_norm, k_norm, cosines, sines)
    q_norm_grad = None if q_norm is None else norms[0].to(q_norm.dtype)
    k_norm_grad = None if k_norm is None else norms[1].to(k_norm.dtype)
    return qkv_grad, q_norm_grad, k_norm_grad, None, None


_time_attention.register_autograd(_differentiate, setup_context=_keep)


class _TimeAttention(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        out: Tensor = _kernels().forward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad)


_directly = entry(_TimeAttention)


def time_attention(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Returns what :func:`train.ops.time_attention.time_attention` does, for what :func:`takes` allows."""
    cosines, sines = (None, None) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    operation = _directly if launches_directly(qkv) else _time_attention
    out: Tensor = operation(qkv.contiguous(), q_norm, k_norm, cosines, sines)
    return out
