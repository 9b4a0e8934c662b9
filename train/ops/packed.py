# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Queries, keys and values as one product gives them."""

from jaxtyping import Float
from torch import Tensor


def taken_apart(qkv: Float[Tensor, "*rows 3 H P"]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of queries, keys and values: (*rows, H, P) each.

    As parts of (rows, 3, H, P): PyTorch joins gradients of up to 4 dimensions in one pass.
    """
    rows = qkv.shape[:-3]
    q, k, v = (part.view(*rows, *part.shape[1:]) for part in qkv.flatten(0, -4).unbind(1))
    return q, k, v
