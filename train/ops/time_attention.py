# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Attention along time: many short sequences, one a place of the frame, read where they lie.

On a GPU, sequences of up to 64 frames go to Triton kernels (``time_attention_kernels``): library kernels take many
times as long as moving the data does. Elsewhere, and as what the kernels are tested against, plain PyTorch. Longer
sequences on a GPU are library kernels' work, by ``train/model/long_time_attention.py``.

Letters: B batch, T frames, S tokens of a frame, H heads, P head width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops import time_attention_op
from train.ops.qk_norm_op import RMS_NORM_EPS
from train.ops.reference import kernel_wanted


def rotate(x: Float[Tensor, "... P"], cos: Float[Tensor, "... P/2"], sin: Float[Tensor, "... P/2"]) -> Tensor:
    """Returns x with each pair of neighbouring channels (2i, 2i + 1) turned by its angle.

    Source: rotary positions, arXiv 2104.09864, in the interleaved order.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def time_attention(
    qkv: Float[Tensor, "B T S 3 H P"],
    *,
    q_norm: Float[Tensor, " P"] | None = None,
    k_norm: Float[Tensor, " P"] | None = None,
    rope: tuple[Float[Tensor, "T P/2"], Float[Tensor, "T P/2"]] | None = None,
) -> Float[Tensor, "B T S H P"]:
    """Returns softmax(q k^T / sqrt(P)) v over the frames of each place.

    Args:
        qkv: Queries, keys and values as one product gives them.
        q_norm: Weight of an RMSNorm of the queries over P; none if None. Before the rotation.
        k_norm: Likewise of the keys.
        rope: Cosines and sines, float32, of the angles by which queries and keys are turned; not turned if None.
    """
    if kernel_wanted("time", qkv) and time_attention_op.takes(qkv.shape[1], qkv.shape[-1]):
        return time_attention_op.time_attention(qkv, q_norm, k_norm, rope)
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # (B, S, H, T, P) each
    if q_norm is not None:
        q = F.rms_norm(q, q.shape[-1:], q_norm, RMS_NORM_EPS)
    if k_norm is not None:
        k = F.rms_norm(k, k.shape[-1:], k_norm, RMS_NORM_EPS)
    if rope is not None:
        q, k = (rotate(t.float(), *rope).to(v.dtype) for t in (q, k))
    out = _sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return out.unflatten(0, q.shape[:2]).permute(0, 3, 1, 2, 4)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention (N, H, T, P); without content, what a kernel of a GPU would keep and no probabilities.

    A single frame goes past PyTorch's kernels: at 24,576 places one made a backward pass on an H100 fail.
    """
    if not q.is_meta:
        if q.shape[2] == 1:
            return (q * k).sum(-1, keepdim=True).softmax(-1) * v
        return F.scaled_dot_product_attention(q, k, v)
    if q.dtype is torch.float32:
        efficient: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return efficient
    flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return flash
