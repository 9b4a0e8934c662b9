# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""LayerNorm with modulation, and gated residuals: what stands between the products of a diffusion transformer.

On a GPU each is one Triton kernel forward and one backward (``modulation_kernels``); elsewhere, and as what the kernels
are tested against, plain PyTorch. Modulation is per sample (G = 1) or per frame (G = T).

What a product in 8 bits reads next is written in 8 bits too, in the same pass, if room for that is given: only where
kernels are launched without PyTorch's dispatcher (see :func:`train.ops.launching.launches_directly`).

Tokens that travel next may be written in parcels, and what is added may come in them (:mod:`train.ops.parcels`): which
order tokens have, their dimensions say. A kernel does so on its way; :func:`writes_parcels` tells where one would.

Letters: B batch, T frames, S tokens of a frame, C parcels, s tokens of a frame in a parcel, D width, G groups of frames
that share a modulation: 1 or T.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops.float8 import Float8Rows, to_rows
from train.ops.modulation_op import LAYER_NORM_EPS, modulated_residual
from train.ops.parcels import Tokens, to_order, to_parcels
from train.ops.reference import kernel_wanted


def _by_kernel(x: Tensor) -> bool:
    return kernel_wanted("modulation", x) and 32 <= x.shape[-1] <= 8192


def writes_parcels(x: Tensor) -> bool:
    """Whether tokens like x are written in parcels without a copy, and read so. Not in compiled graphs, whose exchanges
    take tokens in order."""
    return not torch.compiler.is_compiling() and _by_kernel(x)


def _fill(rows: Float8Rows | None, x: Tensor) -> None:
    if rows is not None:
        for room, converted in zip(rows, to_rows(x.detach().flatten(0, -2)), strict=True):
            room.copy_(converted)


def norm_modulate(
    x: Float[Tensor, "B T S D"],
    shift: Float[Tensor, "B G D"],
    scale: Float[Tensor, "B G D"],
    rows: Float8Rows | None = None,
    *,
    parcels: int | None = None,
) -> Tokens:
    """Returns ``LayerNorm(x) * (1 + scale) + shift``; the norm has no weights and an epsilon of 1e-6.

    Args:
        x: Tokens.
        shift: Of each group.
        scale: Likewise.
        rows: Room for the result in 8 bits.
        parcels: In how many the result is to lie; None: in order.
    """
    if _by_kernel(x):
        return modulated_residual(x, None, None, shift, scale, rows, parcels)[2]
    out = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale[:, :, None]) + shift[:, :, None]
    _fill(rows, out)
    return out if parcels is None else to_parcels(out, parcels)


def gate_add(
    x: Float[Tensor, "B T S D"], h: Float[Tensor, "B T S D"], gate: Float[Tensor, "B G D"]
) -> Float[Tensor, "B T S D"]:
    """Returns ``x + gate * h``."""
    return gate_add_twice(x, h, gate)[0]


def gate_add_twice(
    x: Tokens,
    h: Tokens,
    gate: Float[Tensor, "B G D"],
    rows: Float8Rows | None = None,
    *,
    parcels: int | None = None,
) -> tuple[Tokens, Tokens]:
    """Returns ``x + gate * h`` for two who read it: a kernel adds their gradients on its way.

    Args:
        x: Tokens.
        h: What is added.
        gate: Of each group.
        rows: Room for the result in 8 bits.
        parcels: In how many the result is to lie; None: in order, whatever x and h lie in.
    """
    if _by_kernel(x):
        return modulated_residual(x, h, gate, None, None, rows, parcels)[:2]
    x = to_order(x) + gate[:, :, None] * to_order(h)
    _fill(rows, x)
    x = x if parcels is None else to_parcels(x, parcels)
    return x, x


def gate_add_norm_modulate(
    x: Float[Tensor, "B T S D"],
    h: Float[Tensor, "B T S D"],
    gate: Float[Tensor, "B G D"] | None,
    shift: Float[Tensor, "B G D"],
    scale: Float[Tensor, "B G D"],
    rows: Float8Rows | None = None,
    *,
    parcels: int | None = None,
) -> tuple[Float[Tensor, "B T S D"], Tokens]:
    """Returns the new residual ``x + gate * h`` (``x + h`` without a gate) and its :func:`norm_modulate`.

    Args:
        x: Tokens.
        h: What is added.
        gate: Of each group.
        shift: Likewise.
        scale: Likewise.
        rows: Room for the norm in 8 bits.
        parcels: In how many the norm is to lie; None: in order.
    """
    if _by_kernel(x):
        x, _, out = modulated_residual(x, h, gate, shift, scale, rows, parcels)
        return x, out
    x = x + h if gate is None else gate_add(x, h, gate)
    return x, norm_modulate(x, shift, scale, rows, parcels=parcels)
