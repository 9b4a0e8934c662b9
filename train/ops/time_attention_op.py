"""Attention along time as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Triton is imported there only.
"""

from typing import Any

import torch
from torch import Tensor

from train.ops.head_parts import fits_tiles

MOST_FRAMES = 64
"""The longest sequences that the kernels take: a tile holds whole ones."""


def takes(frames: int, head_width: int) -> bool:
    """Whether the kernels can compute sequences of that length and width."""
    return frames <= MOST_FRAMES and fits_tiles(head_width)


@torch.library.custom_op("latentmill_attention::time_attention", mutates_args=())
def _time_attention(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    B, T, S, _, H, P = qkv.shape
    out = qkv.new_empty(B, T, S, H, P)
    from train.ops import time_attention_kernels as kernels

    kernels.forward(qkv, q_norm, k_norm, cosines, sines, out)
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
    from train.ops import time_attention_kernels as kernels

    qkv_grad = torch.empty_like(qkv)
    return qkv_grad, kernels.backward(grad, qkv, q_norm, k_norm, cosines, sines, qkv_grad)


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
    qkv_grad, norms = _time_attention_backward(grad.contiguous(), qkv, q_norm, k_norm, cosines, sines)
    q_norm_grad = None if q_norm is None else norms[0].to(q_norm.dtype)
    k_norm_grad = None if k_norm is None else norms[1].to(k_norm.dtype)
    return qkv_grad, q_norm_grad, k_norm_grad, None, None


_time_attention.register_autograd(_differentiate, setup_context=_keep)


def time_attention(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Returns what :func:`train.ops.time_attention.time_attention` does, for what :func:`takes` allows."""
    cosines, sines = (None, None) if rope is None else (rope[0].contiguous(), rope[1].contiguous())
    out: Tensor = _time_attention(qkv.contiguous(), q_norm, k_norm, cosines, sines)
    return out
