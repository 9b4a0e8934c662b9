# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""RMSNorm of queries and keys, head by head, between the product that gives them packed and attention.

On a GPU one Triton kernel forward and one backward (``qk_norm_kernels``), which gives the gradient of the packed
product whole: nothing joins three. Elsewhere, and as what the kernels are tested against, plain PyTorch.

Letters: H heads, P head width.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops import qk_norm_op
from train.ops.packed import taken_apart
from train.ops.qk_norm_op import RMS_NORM_EPS
from train.ops.reference import kernel_wanted

_WIDEST = 256
"""Of the heads that a tile holds."""


def qk_norm(
    qkv: Float[Tensor, "*rows 3 H P"], q_weight: Float[Tensor, " P"], k_weight: Float[Tensor, " P"]
) -> tuple[Float[Tensor, "*rows H P"], Float[Tensor, "*rows H P"], Float[Tensor, "*rows H P"]]:
    """Returns queries and keys, each divided by the root of its mean square and weighted; and the values, as a view.

    Args:
        qkv: Queries, keys and values as one product gives them.
        q_weight: Of the queries.
        k_weight: Of the keys.
    """
    if kernel_wanted("qk_norm", qkv) and qkv.shape[-1] <= _WIDEST:
        normed = qk_norm_op.qk_norm(qkv.flatten(0, -4), q_weight, k_weight)
        q, k, v = (t.view(*qkv.shape[:-3], *t.shape[1:]) for t in normed)
        return q, k, v
    q, k, v = taken_apart(qkv)
    shape = qkv.shape[-1:]
    return F.rms_norm(q, shape, q_weight, RMS_NORM_EPS), F.rms_norm(k, shape, k_weight, RMS_NORM_EPS), v
