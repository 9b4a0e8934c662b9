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
    rows, shape = qkv.flatten(0, -4), qkv.shape[-1:]
    if kernel_wanted("qk_norm", qkv) and qkv.shape[-1] <= _WIDEST:
        q, k, v = qk_norm_op.qk_norm(rows, q_weight, k_weight)
    else:
        q, k, v = rows.unbind(1)  # of 4 dimensions: PyTorch joins gradients of up to 4 in one pass
        q, k = F.rms_norm(q, shape, q_weight, RMS_NORM_EPS), F.rms_norm(k, shape, k_weight, RMS_NORM_EPS)
    q, k, v = (t.view(*qkv.shape[:-3], *t.shape[1:]) for t in (q, k, v))
    return q, k, v
