# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Attention along more frames than this project's kernels take: library kernels, on the tokens where they lie.

The sequences of one sample are rows of its product at a fixed distance, which every kernel here can be told. So nothing
is copied into the order of sequences, and the output is in that of tokens, as the next product wants it.

Letters: B batch, T frames, S tokens of a frame, H heads, P head width.
"""

from jaxtyping import Float
from torch import Tensor

from train.model.attention import AttentionBackend, interleaved_attention, interleaved_packed_attention
from train.ops.packed import taken_apart
from train.ops.qk_norm import qk_norm
from train.ops.reference import kernel_wanted
from train.ops.time_attention import rotate
from train.ops.time_attention_op import MOST_FRAMES


def is_long(qkv: Float[Tensor, "B T S 3 H P"]) -> bool:
    """Whether attention along time is for :func:`long_time_attention`: on a GPU, beyond the kernels' length."""
    return qkv.shape[1] > MOST_FRAMES and kernel_wanted("time", qkv)


def long_time_attention(
    qkv: Float[Tensor, "B T S 3 H P"],
    *,
    q_norm: Float[Tensor, " P"] | None = None,
    k_norm: Float[Tensor, " P"] | None = None,
    rope: tuple[Float[Tensor, "T P/2"], Float[Tensor, "T P/2"]] | None = None,
    backend: AttentionBackend | None = None,
) -> Float[Tensor, "B T S H P"]:
    """Returns what :func:`train.ops.time_attention.time_attention` does, by the kernels of the attention facade.

    Args:
        qkv: Queries, keys and values as one product gives them.
        q_norm: Weight of an RMSNorm of the queries over P, before the rotation; none if None.
        k_norm: The same of the keys; both or none.
        rope: Cosines and sines, float32, of the angles by which queries and keys are turned; not turned if None.
        backend: The kernel to use; None chooses one.

    Raises:
        InputError: if ``backend`` does not exist for the tensor's device and dtype.
    """
    if q_norm is None and k_norm is None and rope is None:
        return interleaved_packed_attention(qkv, backend=backend)
    q, k, v = taken_apart(qkv) if q_norm is None or k_norm is None else qk_norm(qkv, q_norm, k_norm)
    if rope is not None:
        cos, sin = (angles[:, None, None] for angles in rope)  # (T, 1, 1, P/2)
        q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
    return interleaved_attention(q, k, v, backend=backend)
