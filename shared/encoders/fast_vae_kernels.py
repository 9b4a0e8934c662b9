"""Triton kernels between the convolutions of an image autoencoder's encoder, on channels-last activations.

A convolution leaves its bias to the kernel behind it, which adds it on the way: to group norm's coefficients, or to a
sum that is written anyhow. So each kernel is one pass over memory.

N pictures, R pixels of a picture, C channels, G groups, K parts in which a picture's statistics are summed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.registers import at_most

_TILE = 4096
_ADD_REGISTERS = 128
"""Of a sum with statistics: Triton 3.8 takes up to 141, which leave 3 programs on a multiprocessor, not 4."""


def _blocks(channels: int) -> tuple[int, int]:
    """Returns pixels and channels of a tile."""
    block_c = triton.next_power_of_2(channels)
    return max(1, _TILE // block_c), block_c


def _part_pixels(pixels: int, channels: int, block_r: int) -> int:
    """Returns pixels of a part, whole tiles: 64 Ki values or more, and 256 parts of a picture at most."""
    parts = min(256, max(1, pixels * channels // 65_536))
    return block_r * triton.cdiv(pixels, block_r * parts)


@triton.jit
def _first_convolution(  # type: ignore[no-untyped-def]
    pixels, weight, out, partial, height, width, channels, part_pixels,
    IN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, picture = tl.program_id(0), tl.program_id(1)
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    total = height * width
    weights = tl.load(
        weight + k[:, None] * channels + c[None, :], mask=(k < 9 * IN)[:, None] & (c < channels)[None, :], other=0.0
    )
    source = pixels + picture.to(tl.int64) * IN * total + (k // 9)[:, None].to(tl.int64) * total
    down, right = (k % 9 // 3 - 1)[:, None], (k % 3 - 1)[:, None]
    sums = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for at in range(part * part_pixels, tl.minimum((part + 1) * part_pixels, total), BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        row, column = (r // width)[None, :] + down, (r % width)[None, :] + right
        known = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (k < 9 * IN)[:, None]
        seen = tl.load(source + row * width + column, mask=known & (r < total)[None, :], other=0.0)  # (K, R)
        values = tl.dot(tl.trans(seen.to(weights.dtype)), weights, input_precision=PRECISION)
        places = picture.to(tl.int64) * total * channels + r[:, None].to(tl.int64) * channels + c[None, :]
        rounded = values.to(out.dtype.element_ty)
        tl.store(out + places, rounded, mask=(r < total)[:, None] & (c < channels)[None, :])
        values = rounded.to(tl.float32)
        sums += tl.sum(values, 0)
        squares += tl.sum(values * values, 0)
    target = partial + (picture * tl.num_programs(0) + part) * 2 * channels + c
    tl.store(target, sums, mask=c < channels)
    tl.store(target + channels, squares, mask=c < channels)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    x, residual, bias, out, partial, pixels, channels, part_pixels,
    ADDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part, picture = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    base = picture.to(tl.int64) * pixels * channels
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if ADDS:
        offset = tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    for at in range(part * part_pixels, tl.minimum((part + 1) * part_pixels, pixels), BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        inside = (r < pixels)[:, None] & (c < channels)[None, :]
        places = base + r[:, None].to(tl.int64) * channels + c[None, :]
        values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            values += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32) + offset
            rounded = values.to(out.dtype.element_ty)
            tl.store(out + places, rounded, mask=inside)
            values = tl.where(inside, rounded.to(tl.float32), 0.0)
        sums += values
        squares += values * values
    target = partial + (picture * tl.num_programs(0) + part) * 2 * channels + c
    tl.store(target, tl.sum(sums, 0), mask=c < channels)
    tl.store(target + channels, tl.sum(squares, 0), mask=c < channels)


@triton.jit
def _coefficients(  # type: ignore[no-untyped-def]
    partial, bias, weight, offset, coefficients, pixels, channels, parts, group, epsilon,
    HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    picture, k, s = tl.program_id(0), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_G)
    c = tl.program_id(1) * group + s
    inside = s < group
    source = partial + (picture * parts + k)[:, None] * 2 * channels + c[None, :]
    both = (k < parts)[:, None] & inside[None, :]
    sums = tl.sum(tl.load(source, mask=both, other=0.0), 0)
    squares = tl.sum(tl.load(source + channels, mask=both, other=0.0), 0)
    means = sums / pixels  # of each channel, without bias
    deviations = squares - sums * means
    if HAS_BIAS:
        added = tl.load(bias + c, mask=inside, other=0.0)
    else:
        added = tl.zeros((BLOCK_G,), tl.float32)
    means = tl.where(inside, means + added, 0.0)
    mean = tl.sum(means) / group
    apart = tl.where(inside, means - mean, 0.0)
    variance = (tl.sum(tl.where(inside, deviations, 0.0)) / pixels + tl.sum(apart * apart)) / group
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(tl.maximum(variance, 0.0) + epsilon)
    shift = tl.load(offset + c, mask=inside, other=0.0).to(tl.float32) + (added - mean) * scale
    target = coefficients + picture * 2 * channels + c
    tl.store(target, scale, mask=inside)
    tl.store(target + channels, shift, mask=inside)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x, coefficients, out, pixels, channels,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    picture, c = tl.program_id(1), tl.arange(0, BLOCK_C)
    scale = tl.load(coefficients + picture * 2 * channels + c, mask=c < channels, other=0.0)
    shift = tl.load(coefficients + picture * 2 * channels + channels + c, mask=c < channels, other=0.0)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (r < pixels)[:, None] & (c < channels)[None, :]
    places = picture.to(tl.int64) * pixels * channels + r[:, None].to(tl.int64) * channels + c[None, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        values *= tl.sigmoid(values)
    tl.store(out + places, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_padded(  # type: ignore[no-untyped-def]
    x, residual, bias, out, height, width, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    picture, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_C)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row, column = r // (width + 1), r % (width + 1)
    known = ((row < height) & (column < width))[:, None] & (c < channels)[None, :]
    pixel = picture * height * width + row.to(tl.int64) * width + column
    places = pixel[:, None] * channels + c[None, :]
    values = tl.load(x + places, mask=known, other=0.0).to(tl.float32)
    values += tl.load(residual + places, mask=known, other=0.0).to(tl.float32)
    values += tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    pixels = (height + 1) * (width + 1)
    targets = (picture * pixels + r.to(tl.int64))[:, None] * channels + c[None, :]
    inside = (r < pixels)[:, None] & (c < channels)[None, :]
    tl.store(out + targets, tl.where(known, values, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax(scores, out, width, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    highest, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    for at in range(0, width, BLOCK):
        inside = at + columns < width
        values = tl.load(scores + row * width + at + columns, mask=inside, other=float("-inf")) * factor
        above = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp2(highest - above) + tl.sum(tl.exp2(values - above), 0)
        highest = above
    for at in range(0, width, BLOCK):
        inside = at + columns < width
        values = tl.load(scores + row * width + at + columns, mask=inside, other=float("-inf")) * factor
        weights = tl.exp2(values - highest) / total
        tl.store(out + row * width + at + columns, weights.to(out.dtype.element_ty), mask=inside)


def first_convolution(pixels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a convolution of 3x3 with padding but without bias, (N, C, height, width), and its statistics.

    cuDNN takes five times as long for so few input channels.

    Args:
        pixels: (N, 3, height, width), contiguous.
        weight: (C, 3, 3, 3).
    """
    pictures, inputs, height, width = pixels.shape
    channels, block_r = len(weight), 64
    out = torch.empty(
        pictures, channels, height, width,
        device=pixels.device, dtype=weight.dtype, memory_format=torch.channels_last,
    )  # fmt: skip
    part_pixels = _part_pixels(height * width, channels, block_r)
    parts = triton.cdiv(height * width, part_pixels)
    partial = torch.empty(pictures, parts, 2, channels, device=pixels.device, dtype=torch.float32)
    _first_convolution[(parts, pictures)](
        pixels, weight.contiguous().view(channels, -1).t().contiguous(), out, partial,
        height, width, channels, part_pixels,
        IN=inputs, BLOCK_R=block_r, BLOCK_K=max(16, triton.next_power_of_2(9 * inputs)),
        BLOCK_C=max(16, triton.next_power_of_2(channels)), PRECISION=_precision(weight.dtype),
    )  # fmt: skip
    return out, partial


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def statistics(x: Tensor) -> Tensor:
    """Returns sums and sums of squares (N, K, 2, C), float32, of parts of each picture (N, C, height, width)."""
    return _summed(x, x, x, x, adds=False)


def add(x: Tensor, residual: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``x + residual + bias``, (N, C, height, width), and its statistics. Bias is (C,), float32."""
    out = torch.empty_like(x)
    return out, _summed(x, residual, bias, out, adds=True)


def _summed(x: Tensor, residual: Tensor, bias: Tensor, out: Tensor, *, adds: bool) -> Tensor:
    pictures, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
    block_r, block_c = _blocks(channels)
    part_pixels = _part_pixels(pixels, channels, block_r)
    parts = triton.cdiv(pixels, part_pixels)
    partial = torch.empty(pictures, parts, 2, channels, device=x.device, dtype=torch.float32)
    _statistics[(parts, pictures)](
        x, residual, bias, out, partial, pixels, channels, part_pixels, ADDS=adds, BLOCK_R=block_r, BLOCK_C=block_c,
        **at_most(_ADD_REGISTERS, triton.__version__) if adds and x.dtype.itemsize == 2 else {},
    )  # fmt: skip
    return partial


def normalise(x: Tensor, partial: Tensor, bias: Tensor | None, norm: torch.nn.GroupNorm, *, silu: bool) -> Tensor:
    """Returns group norm of ``x + bias``, (N, C, height, width), with SiLU behind it if asked for.

    Args:
        x: Of which ``partial`` are the statistics.
        partial: (N, K, 2, C).
        bias: (C,), float32, not in the statistics.
        norm: Groups, weights and epsilon.
        silu: Whether SiLU follows.
    """
    pictures, channels, pixels = len(x), x.shape[1], x[0, 0].numel()
    group, parts = channels // norm.num_groups, partial.shape[1]
    coefficients = torch.empty(pictures, 2, channels, device=x.device, dtype=torch.float32)
    _coefficients[(pictures, norm.num_groups)](
        partial, partial if bias is None else bias, norm.weight, norm.bias, coefficients,
        pixels, channels, parts, group, norm.eps,
        HAS_BIAS=bias is not None, BLOCK_K=triton.next_power_of_2(parts), BLOCK_G=triton.next_power_of_2(group),
    )  # fmt: skip
    out = torch.empty_like(x)
    block_r, block_c = _blocks(channels)
    _normalise[(triton.cdiv(pixels, block_r), pictures)](
        x, coefficients, out, pixels, channels, SILU=silu, BLOCK_R=block_r, BLOCK_C=block_c
    )
    return out


def add_padded(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """Returns ``x + residual + bias`` with a row and a column of zeros behind it, (N, C, height + 1, width + 1)."""
    pictures, channels, height, width = x.shape
    out = torch.empty(
        pictures, channels, height + 1, width + 1,
        device=x.device, dtype=x.dtype, memory_format=torch.channels_last,
    )  # fmt: skip
    block_r, block_c = _blocks(channels)
    _add_padded[(triton.cdiv((height + 1) * (width + 1), block_r), pictures)](
        x, residual, bias, out, height, width, channels, BLOCK_R=block_r, BLOCK_C=block_c
    )
    return out


def softmax(scores: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Returns ``softmax(scores * factor)`` over the last dimension of contiguous float32 scores."""
    out = torch.empty_like(scores, dtype=dtype)
    width = scores.shape[-1]
    block = min(8192, triton.next_power_of_2(width))
    _softmax[(scores.numel() // width,)](scores, out, width, factor * 1.4426950408889634, BLOCK=block, num_warps=8)
    return out
