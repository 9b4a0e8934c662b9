"""Triton kernels of T5's encoder over captions that lie one after another, each with what it computes in plain torch.

Products go to cuBLAS; these are what lies between them, each one pass over memory. None depends on the number of
tokens, so nothing is compiled again when a batch has another size.

T tokens of a batch, H heads, D width of a head, W width of the model, F inner width of the feed-forward layer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.encoders.fast_t5 import TILE

_KEYS = 64
"""Keys that attention looks at together."""


@triton.jit
def _rms_norm(source, weight, out, width, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(source + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / width + epsilon)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, out: Tensor | None = None) -> Tensor:
    """Returns ``hidden / rms(hidden) * weight`` (T, W), statistics and product in float32, rounded once.

    Args:
        out: Where it is written, if given.
    """
    out = torch.empty_like(hidden) if out is None else out
    width = hidden.shape[1]
    _rms_norm[(len(hidden),)](hidden, weight, out, width, epsilon, BLOCK=triton.next_power_of_2(width), num_warps=8)
    return out


@triton.jit
def _gated_gelu(source, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(source + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    linear = tl.load(source + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    # gelu by tanh: (1 + tanh(z)) / 2 is sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    gelu = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + token * width + columns, (gelu * linear).to(out.dtype.element_ty), mask=inside)


def gated_gelu(inner: Tensor) -> Tensor:
    """Returns ``gelu(gate) * linear`` (T, F), by tanh and rounded once, of gate and linear side by side (T, 2F)."""
    tokens, width = inner.shape[0], inner.shape[1] // 2
    out = inner.new_empty(tokens, width)
    block = min(2048, triton.next_power_of_2(width))
    _gated_gelu[(tokens, triton.cdiv(width, block))](inner, out, width, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _attention(  # type: ignore[no-untyped-def]
    qkv, starts, ends, tiles, bias, out, reach, pitch,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    first_row, end_row = tl.load(tiles + tile), tl.load(tiles + tile + 1)
    first, last = tl.load(starts + first_row), tl.load(ends + end_row - 1)
    is_one_caption = tl.load(ends + first_row) == last
    rows = first_row - first + tl.arange(0, BLOCK_M)  # places count from the first key
    is_token = rows < end_row - first
    channels = tl.arange(0, BLOCK_D)
    is_channel = channels < WIDTH
    stride: tl.constexpr = 3 * HEADS * WIDTH
    queries = qkv + first.to(tl.int64) * stride + head * WIDTH
    keys, values = queries + HEADS * WIDTH, queries + 2 * HEADS * WIDTH
    q = tl.load(queries + rows[:, None] * stride + channels, mask=is_token[:, None] & is_channel, other=0.0)
    known = tl.minimum(rows, end_row - first - 1)
    start, end = tl.load(starts + first + known) - first, tl.load(ends + first + known) - first
    at_first = reach - 1 + BLOCK_M - known  # where the table has the bias of the first key
    at_row = bias + head * VECTOR * pitch + at_first % VECTOR * pitch + at_first // VECTOR * VECTOR
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(0, last - first, BLOCK_N):
        columns = at + tl.arange(0, BLOCK_N)
        is_key = (columns < last - first)[:, None] & is_channel
        at_keys = columns[:, None] * stride + channels
        k = tl.load(keys + at_keys, mask=is_key, other=0.0)
        added = tl.load(at_row[:, None] + columns[None, :]).to(tl.float32)
        scores = tl.dot(q, tl.trans(k), added, input_precision=PRECISION)
        scores = tl.where(columns[None, :] < last - first, scores, float("-inf"))
        if not is_one_caption:
            inside = (columns[None, :] >= start[:, None]) & (columns[None, :] < end[:, None])
            scores = tl.where(inside, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        finite = tl.where(above == float("-inf"), 0.0, above) * 1.4426950408889634  # for exp2
        shrink = tl.exp2(highest * 1.4426950408889634 - finite)
        weights = tl.exp2(scores * 1.4426950408889634 - finite[:, None])
        v = tl.load(values + at_keys, mask=is_key, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
        highest = above
    sums *= (1.0 / total)[:, None]
    target = out + first.to(tl.int64) * (HEADS * WIDTH) + head * WIDTH + rows[:, None] * (HEADS * WIDTH) + channels
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_token[:, None] & is_channel)


def bias_in_vectors(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the bias as :func:`attention` reads it, (H, V, P): of 16 bytes, or V values, at a time.

    Copy s begins s places later than copy 0, so that vectors of one copy or another begin at every place.

    Args:
        bias: (H, 2 R - 1), float32: added to the score by head and ``key - query + R - 1``; captions have R tokens at
            most.
        dtype: Of the weights that the bias comes from, which it is then exact in.
    """
    vector, reach = 16 // dtype.itemsize, (bias.shape[1] + 1) // 2
    before, behind = TILE, max(reach, TILE) + _KEYS  # what is read there is left out again
    pitch = triton.cdiv(before + reach + behind, 16) * 16
    padded = bias.new_zeros(len(bias), pitch + vector)
    padded[:, before : before + bias.shape[1]] = bias
    return torch.stack([padded[:, shift : shift + pitch] for shift in range(vector)], 1).to(dtype).contiguous()


def attention(qkv: Tensor, starts: Tensor, ends: Tensor, tiles: Tensor, bias: Tensor, reach: int) -> Tensor:
    """Returns each token's attention over its own caption (T, H * D), unscaled as T5's is.

    A program takes the tokens of one tile in one head, and visits the keys of their captions only. All heads of a tile
    run side by side, so that whole rows of memory are read at a time. Only tiles of several captions compare each key
    with each query's caption.

    Args:
        qkv: (T, 3, H, D).
        starts: (T,), int32: where a token's caption begins.
        ends: (T,), int32: where it ends.
        tiles: Borders of tiles, the first 0 and the last T, int32; a tile has :data:`TILE` tokens at most.
        bias: By :func:`bias_in_vectors`, of this type.
        reach: R: captions have so many tokens at most.
    """
    tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(tokens, heads * width)
    _attention[(heads, len(tiles) - 1)](
        qkv, starts, ends, tiles, bias, out, reach, bias.shape[2],
        HEADS=heads, WIDTH=width, BLOCK_D=max(16, triton.next_power_of_2(width)), VECTOR=bias.shape[1],
        BLOCK_M=TILE, BLOCK_N=_KEYS, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
