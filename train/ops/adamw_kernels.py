"""The Triton kernel of AdamW: each value is read once and written once, which is all that limits it.

Of a value with a bfloat16 gradient and a bfloat16 copy in the model 28 bytes move, 36 with an average; half of them in.
"""

import triton
import triton.language as tl
from torch import Tensor

from train.ops.adamw import AdamWSettings

BLOCK, WARPS = 1024, 4


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    gradient, weights, exp_avg, exp_avg_sq, model_weights, average, factors,
    decay, beta1_rest, beta2, beta2_rest, eps, share, N,
    HAS_AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(factors + 3) != 0.0:
        scale, step_size, inverse_root = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < N
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * scale
        w = tl.load(weights + at, mask=inside, other=0.0) * decay
        m = tl.load(exp_avg + at, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
        m += beta1_rest * (g - m)
        v = v * beta2 + beta2_rest * g * g
        w -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root + eps)
        tl.store(weights + at, w, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(model_weights + at, w.to(model_weights.dtype.element_ty), mask=inside)
        if HAS_AVERAGE:
            a = tl.load(average + at, mask=inside, other=0.0)
            tl.store(average + at, a + share * (w - a), mask=inside)


def step(
    gradient: Tensor,
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model_weights: Tensor,
    factors: Tensor,
    settings: AdamWSettings,
    average: Tensor | None,
    share: float,
) -> None:
    """Takes a step in place; see :func:`train.ops.adamw.adamw_step`."""
    N, (beta1, beta2) = gradient.numel(), settings.betas
    _step[(triton.cdiv(N, BLOCK),)](
        gradient, weights, exp_avg, exp_avg_sq, model_weights, average, factors,
        1 - settings.lr * settings.weight_decay, 1 - beta1, beta2, 1 - beta2, settings.eps, share, N,
        HAS_AVERAGE=average is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
