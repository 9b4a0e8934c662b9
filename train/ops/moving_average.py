# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""A step of an exponential moving average that is left out where the device says so.

On a GPU it is one Triton kernel (``moving_average_kernels``); elsewhere, and as what the kernel is tested against,
plain PyTorch.

Letters: N values.
"""

from jaxtyping import Float
from torch import Tensor


def follow(average: Float[Tensor, " N"], values: Float[Tensor, " N"], share: float, taken: Float[Tensor, ""]) -> None:
    """Moves the average in place by a share of the way to the values, or not at all where ``taken`` is 0.

    Args:
        average: Float32, contiguous.
        values: Likewise.
        share: From 0 to 1.
        taken: 1 or 0, on their device.
    """
    if average.is_cuda:
        from train.ops import moving_average_kernels

        moving_average_kernels.follow(average, values, share, taken)
    else:
        average.lerp_(values, share * taken)
