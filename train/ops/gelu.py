# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""A linear layer and its tanh-GELU.

On a GPU the product goes without its bias, which a Triton kernel (``gelu_kernels``) adds on the way to the GELU, and
whose gradient it sums on the way back: no pass over memory is made for the bias. What is kept is the product.
Elsewhere, and as what the kernel is tested against, plain PyTorch.

Letters: N rows, I inputs, O outputs.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops import gelu_op
from train.ops.reference import kernel_wanted


def _by_kernel(x: Tensor, bias: Tensor) -> bool:
    return kernel_wanted("gelu", x) and bias.dtype == x.dtype


def bias_gelu(x: Float[Tensor, "N O"], bias: Float[Tensor, " O"]) -> Float[Tensor, "N O"]:
    """Returns ``GELU(x + bias)``, by its tanh formula (arXiv 1606.08415)."""
    if _by_kernel(x, bias):
        return gelu_op.bias_gelu(x, bias)
    return F.gelu(x + bias, approximate="tanh")


def linear_gelu(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "N O"]:
    """Returns ``GELU(x weight^T + bias)``."""
    if _by_kernel(x, bias):
        return bias_gelu(F.linear(x, weight), bias)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
