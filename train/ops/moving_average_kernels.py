"""The Triton kernel of a moving average: 8 bytes of a value in, 4 out."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4


@triton.jit
def _follow(average, values, taken, share, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(taken) != 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        a = tl.load(average + at, mask=inside, other=0.0)
        tl.store(average + at, a + share * (tl.load(values + at, mask=inside, other=0.0) - a), mask=inside)


def follow(average: Tensor, values: Tensor, share: float, taken: Tensor) -> None:
    """Moves the average in place; see :func:`train.ops.moving_average.follow`."""
    N = average.numel()
    _follow[(triton.cdiv(N, BLOCK),)](average, values, taken, share, N, BLOCK=BLOCK, num_warps=WARPS)
