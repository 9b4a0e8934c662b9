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

from train.ops.gelu_op import bias_gelu
from train.ops.reference import kernel_wanted


def linear_gelu(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"]
) -> Float[Tensor, "N O"]:
    """Returns ``GELU(x weight^T + bias)``, by its tanh formula (arXiv 1606.08415)."""
    if kernel_wanted("gelu", x) and bias.dtype == x.dtype == weight.dtype:
        return bias_gelu(F.linear(x, weight), bias)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
