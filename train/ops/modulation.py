# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""LayerNorm with modulation, and gated residuals: what stands between the products of a diffusion transformer.

On a GPU each is one Triton kernel forward and one backward (``modulation_kernels``); elsewhere, and as what the kernels
are tested against, plain PyTorch. Modulation is per sample (G = 1) or per frame (G = T).

Letters: B batch, T frames, S tokens of a frame, D width, G groups of frames that share a modulation: 1 or T.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops.modulation_op import LAYER_NORM_EPS, modulated_residual
from train.ops.reference import kernel_wanted


def _by_kernel(x: Tensor) -> bool:
    return kernel_wanted("modulation", x) and 32 <= x.shape[-1] <= 8192


def norm_modulate(
    x: Float[Tensor, "B T S D"], shift: Float[Tensor, "B G D"], scale: Float[Tensor, "B G D"]
) -> Float[Tensor, "B T S D"]:
    """Returns ``LayerNorm(x) * (1 + scale) + shift``; the norm has no weights and an epsilon of 1e-6."""
    if _by_kernel(x):
        return modulated_residual(x, None, None, shift, scale)[2]
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale[:, :, None]) + shift[:, :, None]


def gate_add(
    x: Float[Tensor, "B T S D"], h: Float[Tensor, "B T S D"], gate: Float[Tensor, "B G D"]
) -> Float[Tensor, "B T S D"]:
    """Returns ``x + gate * h``."""
    return gate_add_twice(x, h, gate)[0]


def gate_add_twice(
    x: Float[Tensor, "B T S D"], h: Float[Tensor, "B T S D"], gate: Float[Tensor, "B G D"]
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"]]:
    """Returns ``x + gate * h`` for two who read it: a kernel adds their gradients on its way."""
    if _by_kernel(x):
        return modulated_residual(x, h, gate, None, None)[:2]
    x = x + gate[:, :, None] * h
    return x, x


def gate_add_norm_modulate(
    x: Float[Tensor, "B T S D"],
    h: Float[Tensor, "B T S D"],
    gate: Float[Tensor, "B G D"] | None,
    shift: Float[Tensor, "B G D"],
    scale: Float[Tensor, "B G D"],
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"]]:
    """Returns the new residual ``x + gate * h`` (``x + h`` without a gate) and its :func:`norm_modulate`."""
    if _by_kernel(x):
        x, _, out = modulated_residual(x, h, gate, shift, scale)
        return x, out
    x = x + h if gate is None else gate_add(x, h, gate)
    return x, norm_modulate(x, shift, scale)
