"""FlashAttention 3 on queries, keys and values as one product gives them, whose gradient is one tensor again.

PyTorch would join the gradients of three views by a pass over memory. The kernels write wherever rows begin, so here
they write into the slices of one gradient. Sequences may be interleaved, as those along time are: they are read, and
the output is written, where they lie.

Letters: B batch, N tokens of a sequence, S sequences whose tokens are interleaved, H heads, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor

from train.model.flash_attention_3 import cudnn_forward, kernels


def _sequences(t: Tensor) -> tuple[Tensor, ...]:
    """Returns views (sequences, N, ...) of (B, N, S, ...): as few as strides can express."""
    if t.shape[2] == 1:
        return (t.squeeze(2),)
    return tuple(sample.transpose(0, 1) for sample in t.unbind(0))


@torch.library.custom_op("latentmill_attention::flash_attention_3_packed", mutates_args=())
def _packed(qkv: Tensor, by_cudnn: bool) -> tuple[Tensor, Tensor]:
    B, N, S, _, H, D = qkv.shape
    sequences = _sequences(qkv)
    if by_cudnn and len(sequences) == 1:
        result, row_sums = cudnn_forward(*sequences[0].unbind(2))
        result = result.unsqueeze(2) if S == 1 else result.transpose(0, 1).unsqueeze(0)
        return result.contiguous(), row_sums.unsqueeze(0)
    out = qkv.new_empty(B, N, S, H, D)
    sums = []
    for part, to in zip(sequences, _sequences(out), strict=True):
        q, k, v = part.unbind(2)
        sums.append(kernels().fwd(q, k, v, out=to, softmax_scale=D**-0.5, num_splits=1)[1])
    return out, sums[0].unsqueeze(0) if len(sums) == 1 else torch.stack(sums)


@_packed.register_fake
def _(qkv: Tensor, _by_cudnn: bool) -> tuple[Tensor, Tensor]:
    B, N, S, _, H, D = qkv.shape
    sums = (1, B, H, N) if S == 1 else (B, S, H, N)
    return qkv.new_empty(B, N, S, H, D), qkv.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("latentmill_attention::flash_attention_3_packed_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    qkv_grad = torch.empty_like(qkv)
    parts = (*(_sequences(t) for t in (grad, qkv, out)), sums, _sequences(qkv_grad))
    for of_out, part, result, of_rows, to in zip(*parts, strict=True):
        dq, dk, dv = to.unbind(2)
        kernels().bwd(
            of_out,
            *part.unbind(2),
            result,
            of_rows,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=qkv.shape[-1] ** -0.5,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    return qkv_grad


@_backward.register_fake
def _(_grad: Tensor, qkv: Tensor, _out: Tensor, _sums: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _keep(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _sums_grad: None) -> tuple[Tensor | None, None]:
    return None if grad is None else _backward(grad.contiguous(), *ctx.saved_tensors), None


_packed.register_autograd(_differentiate, setup_context=_keep)


def flash_attention_3_packed(qkv: Tensor, *, by_cudnn: bool = False) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v over each sequence, (B, N, S, H, D).

    Args:
        qkv: (B, N, S, 3, H, D): token n of a sample's S sequences lie next to each other.
        by_cudnn: Whether the forward pass is cuDNN's where it reads and writes sequences where they lie: those of one
            sample, or one of each.

    Raises:
        InputError: if the library is missing or was not loaded.
    """
    return _packed(qkv.contiguous(), by_cudnn)[0]
