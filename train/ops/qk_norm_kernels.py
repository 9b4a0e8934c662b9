"""The Triton kernels of RMSNorm of queries and keys: one pass over the packed product forward, one over its gradient.

A tile is of heads of tokens one after the other, whose queries, keys and values a program takes together: many loads
in flight, a token's own places of memory at once. A head is one row of a power of two, although 72 leaves 44 % of its
lanes idle: both sums of a row then stay within a warp and in one layout, and moving the data takes longer anyway. The
backward pass computes the statistic again, writes the gradient of the packed product, that of the values copied, and
sums the weights' gradients on its way.

Letters: N tokens, H heads, P head width.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.ops.launching import Launch
from train.ops.partial_sums_kernels import add_partial_sums
from train.ops.qk_norm_op import RMS_NORM_EPS

FORWARD_TILE, FORWARD_WARPS = 2048, 2
BACKWARD_TILE, BACKWARD_WARPS = 2048, 8
"""Values of queries, and as many of keys: in the backward pass, of bfloat16, one load of 16 bytes a thread."""
BACKWARD_PROGRAMS = 396
"""About as many: three for each of Hopper's 132 multiprocessors, all of which it holds at once."""


@triton.jit
def _add_both(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


@triton.jit
def _load_weight(weight, P: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.arange(0, COLUMNS)
    return tl.load(weight + columns, mask=columns < P, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, weight, P: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype = x.dtype
    x = x.to(tl.float32)
    return (x * tl.rsqrt(tl.sum(x * x, 1) / P + EPS)[:, None] * weight).to(dtype)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, q, k, num_heads,
    H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    heads, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (heads < num_heads)[:, None] & (columns < P)[None, :]
    token, to = (heads // H).to(tl.int64), heads.to(tl.int64)[:, None] * P + columns[None, :]
    at = (token * (2 * H * P))[:, None] + to
    queries = tl.load(qkv + at, mask=inside, other=0.0)
    keys = tl.load(qkv + at + H * P, mask=inside, other=0.0)
    # all loads before anything waits for one
    q_scale, k_scale = _load_weight(q_weight, P, COLUMNS), _load_weight(k_weight, P, COLUMNS)
    tl.store(q + to, _normed(queries, q_scale, P, EPS), mask=inside)
    tl.store(k + to, _normed(keys, k_scale, P, EPS), mask=inside)


@triton.jit
def _before_norm(x, dy, weight, P: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of x, and what the weight's gradient is the sum of over all rows."""
    x, dy = x.to(tl.float32), dy.to(tl.float32)
    weighted = dy * weight
    squares, along = tl.reduce((x * x, weighted * x), 1, _add_both)
    rrms = tl.rsqrt(squares / P + EPS)
    normed = x * rrms[:, None]
    return (weighted - normed * (rrms * along / P)[:, None]) * rrms[:, None], dy * normed


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    q_grad, k_grad, v_grad, qkv, q_weight, k_weight, grad, sums, num_heads, share_heads,
    H: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    q_scale, k_scale = _load_weight(q_weight, P, COLUMNS), _load_weight(k_weight, P, COLUMNS)
    q_total, k_total = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((share + 1) * share_heads, num_heads)
    for first in range(share * share_heads, end, ROWS):
        heads = first + tl.arange(0, ROWS)
        inside = (heads < end)[:, None] & (columns < P)[None, :]
        token, head = (heads // H).to(tl.int64), (heads % H * P)[:, None] + columns[None, :]
        at = (token * (3 * H * P))[:, None] + head
        q = tl.load(qkv + at, mask=inside, other=0.0)
        dq = tl.load(q_grad + (token * Q_ROW)[:, None] + head, mask=inside, other=0.0)
        k = tl.load(qkv + at + H * P, mask=inside, other=0.0)
        dk = tl.load(k_grad + (token * K_ROW)[:, None] + head, mask=inside, other=0.0)
        dv = tl.load(v_grad + (token * V_ROW)[:, None] + head, mask=inside, other=0.0)
        tl.store(grad + at + 2 * H * P, dv, mask=inside)
        dx, along = _before_norm(q, dq, q_scale, P, EPS)
        tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=inside)
        q_total += along
        dx, along = _before_norm(k, dk, k_scale, P, EPS)
        tl.store(grad + at + H * P, dx.to(grad.dtype.element_ty), mask=inside)
        k_total += along
    to = sums + share.to(tl.int64) * P + columns
    tl.store(to, tl.sum(q_total, 0), mask=columns < P)
    tl.store(to + tl.num_programs(0).to(tl.int64) * P, tl.sum(k_total, 0), mask=columns < P)


def _tile(width: int, values: int) -> tuple[int, int]:
    """Returns the rows and columns of a tile of so many values."""
    columns = triton.next_power_of_2(width)
    return values // columns, columns


Types = tuple[torch.dtype, torch.dtype]
"""Of the weights of queries and of keys."""


@lru_cache(maxsize=1024)
def _forward_launch(_device: torch.device, _dtype: torch.dtype, shape: torch.Size, _weights: Types) -> Launch:
    N, _, H, P = shape
    rows, columns = _tile(P, FORWARD_TILE)
    return Launch(
        _forward,
        (triton.cdiv(N * H, rows),),
        (N * H,),
        (H, P, rows, columns, RMS_NORM_EPS),
        num_warps=FORWARD_WARPS,
    )


@lru_cache(maxsize=1024)
def _backward_launch(
    _device: torch.device, _dtype: torch.dtype, shape: torch.Size, _weights: Types, rows: tuple[int, ...]
) -> tuple[Launch, int]:
    """Returns the launch, and how many programs share the heads.

    Args:
        shape: Of the packed product.
        rows: Values from one token to the next, in the gradients of queries, keys and values.
    """
    N, _, H, P = shape
    tile_rows, columns = _tile(P, BACKWARD_TILE)
    share_heads = triton.cdiv(triton.cdiv(N * H, tile_rows), BACKWARD_PROGRAMS) * tile_rows
    shares = triton.cdiv(N * H, share_heads)
    launch = Launch(
        _backward,
        (shares,),
        (N * H, share_heads),
        (H, P, tile_rows, columns, RMS_NORM_EPS, *rows),
        num_warps=BACKWARD_WARPS,
    )
    return launch, shares


def forward(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns normalised queries and keys (N, H, P) of contiguous ``qkv`` (N, 3, H, P)."""
    N, _, H, P = shape = qkv.shape
    q, k = qkv.new_empty((N, H, P)), qkv.new_empty((N, H, P))
    _forward_launch(qkv.device, qkv.dtype, shape, (q_weight.dtype, k_weight.dtype))(qkv, q_weight, k_weight, q, k)
    return q, k


def backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of ``qkv``, and those of the weights (2, P), float32.

    Args:
        q_grad: Of the normalised queries (N, H, P), a token's heads one after the other.
        k_grad: Likewise of the keys.
        v_grad: Likewise of the values.
        qkv: What was normalised.
        q_weight: Of the queries.
        k_weight: Of the keys.
    """
    launch, shares = _backward_launch(
        qkv.device, qkv.dtype, qkv.shape, (q_weight.dtype, k_weight.dtype),
        (q_grad.stride(0), k_grad.stride(0), v_grad.stride(0)),
    )  # fmt: skip
    grad = torch.empty_like(qkv)
    sums = qkv.new_empty((2, shares, qkv.shape[-1]), dtype=torch.float32)
    launch(q_grad, k_grad, v_grad, qkv, q_weight, k_weight, grad, sums)
    return grad, add_partial_sums(sums, sums.new_empty((2, qkv.shape[-1])))
