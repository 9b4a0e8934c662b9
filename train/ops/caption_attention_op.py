"""Attention to captions as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Triton is imported there only.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("latentmill_attention::caption_attention", mutates_args=())
def _caption_attention(q: Tensor, kv: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    from train.ops import caption_attention_kernels as kernels

    B, N, H, _ = q.shape
    out, sums = torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)
    kernels.forward(q, kv, borders, out, sums)
    return out, sums


@_caption_attention.register_fake
def _(q: Tensor, kv: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)


@torch.library.custom_op("latentmill_attention::caption_attention_backward", mutates_args=())
def _caption_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, borders: Tensor | None, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    from train.ops import caption_attention_kernels as kernels

    q_grad = torch.empty_like(q)
    return q_grad, kernels.backward(grad, q, kv, borders, out, sums, q_grad)


@_caption_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, kv: Tensor, borders: Tensor | None, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(kv)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _sums_grad: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    return *_caption_attention_backward(grad.contiguous(), *ctx.saved_tensors), None


_caption_attention.register_autograd(_differentiate, setup_context=_keep)


def caption_attention(q: Tensor, kv: Tensor, borders: Tensor | None) -> Tensor:
    """Returns the attention (B, N, H, P) of each sample's queries to its own keys.

    Args:
        q: (B, N, H, P).
        kv: Keys and values (B, M, 2, H, P), a sample's valid ones first.
        borders: (2 B + 1,) int32: where, of all samples' keys end to end, those that are valid and those that are not
            begin, in turn; and the end. None: all are valid.
    """
    out, _ = _caption_attention(q.contiguous(), kv.contiguous(), borders)
    return out
