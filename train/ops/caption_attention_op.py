"""Attention to captions as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Where nobody asks for that, the
kernels are launched without the operator. Triton is imported on a GPU only.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from train.ops.launching import entry, launches_directly


@cache
def _kernels() -> ModuleType:
    from train.ops import caption_attention_kernels

    return caption_attention_kernels


@torch.library.custom_op("latentmill_attention::caption_attention", mutates_args=())
def _caption_attention(q: Tensor, kv: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    results: tuple[Tensor, Tensor] = _kernels().forward(q, kv, borders)
    return results


@_caption_attention.register_fake
def _(q: Tensor, kv: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("latentmill_attention::caption_attention_backward", mutates_args=())
def _caption_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, borders: Tensor | None, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _kernels().backward(grad, q, kv, borders, out, sums)
    return grads


@_caption_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, kv: Tensor, borders: Tensor | None, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(kv)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _sums_grad: None = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    backward = _kernels().backward if launches_directly(grad) else _caption_attention_backward
    return *backward(grad.contiguous(), *ctx.saved_tensors), None


_caption_attention.register_autograd(_differentiate, setup_context=_keep)


class _CaptionAttention(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, borders: Tensor | None) -> Tensor:
        out, sums = _kernels().forward(q, kv, borders)
        ctx.save_for_backward(q, kv, borders, out, sums)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grad)


_directly = entry(_CaptionAttention)


def caption_attention(q: Tensor, kv: Tensor, borders: Tensor | None) -> Tensor:
    """Returns the attention (B, N, H, P) of each sample's queries to its own keys.

    Args:
        q: (B, N, H, P).
        kv: Keys and values (B, M, 2, H, P), a sample's valid ones first.
        borders: (2 B + 1,) int32: where, of all samples' keys end to end, those that are valid and those that are not
            begin, in turn; and the end. None: all are valid.

    Raises:
        TypeError: if queries are of another type than keys and values.
    """
    if q.dtype != kv.dtype:
        raise TypeError(f"queries are {q.dtype}, keys and values {kv.dtype}: the kernels take one type; convert one")
    q, kv = q.contiguous(), kv.contiguous()
    out: Tensor
    if launches_directly(q):
        out = _directly(q, kv, borders)
    else:
        out, _ = _caption_attention(q, kv, borders)
    return out
