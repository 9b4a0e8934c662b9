# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""A bias and the tanh-GELU after it, which :mod:`train.ops.linear` puts behind a product.

Letters: N rows, O outputs.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from train.ops import gelu_op
from train.ops.reference import kernel_wanted


def bias_gelu(x: Float[Tensor, "N O"], bias: Float[Tensor, " O"]) -> Float[Tensor, "N O"]:
    """Returns ``GELU(x + bias)``, by its tanh formula (arXiv 1606.08415).

    On a GPU one Triton kernel, whose backward pass sums the bias's gradient on its way (``gelu_kernels``).
    """
    if kernel_wanted("gelu", x) and bias.dtype == x.dtype:
        return gelu_op.bias_gelu(x, bias)
    return F.gelu(x + bias, approximate="tanh")
