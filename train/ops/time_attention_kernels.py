"""The Triton kernels of attention along time: each sequence is read once and written once, where it lies.

A program takes as many sequences as fill a tile of rows. Scores of the whole tile are one product; those between
sequences are masked, which wastes arithmetic that the kernel has to spare, since moving queries, keys, values and
outputs takes longer. Softmax needs no second pass, as a tile holds whole sequences, so the backward pass computes it
again from queries and keys: nothing but the input is kept for it.

With norms or rotation the backward pass of a program has three phases: normalised, turned queries and keys are written
to the places of their gradients, some rows at a time; then it is as without, and leaves there what goes through norm
and rotation, again some rows at a time. In one phase, products' layouts have to be converted and summed over rows, and
registers leave two programs on a multiprocessor.

Letters: B batch, T frames, S tokens of a frame, H heads, P head width, A + C its two parts; G sequences of a tile.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.registers import at_most
from train.ops.head_parts import head_parts, precision
from train.ops.head_tiles import dot, load_rows, store_rows
from train.ops.launching import Launch
from train.ops.qk_norm_op import RMS_NORM_EPS
from train.ops.time_attention_op import MOST_FRAMES

TILE_ROWS = MOST_FRAMES
PART_ROWS = tl.constexpr(32)
"""Rows that go through norm and rotation at a time in the backward pass."""
WARPS, WARPS_OF_LARGE_PRODUCTS = 4, 8
"""The second beyond 32 frames, where neither norm nor rotation takes the registers."""
BACKWARD_REGISTERS = 168
"""With norms and heads of 72 or 80: newer Tritons take up to 220, which leave 2 programs on a multiprocessor, not 3."""


@triton.jit
def _add_both(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


@triton.jit
def _turned(x, cosines, sines, at, inside, SIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each pair of neighbouring columns of x (R, W), float32, turned by the angles at (R, W/2)."""
    cos, sin = tl.load(cosines + at, mask=inside, other=1.0), SIGN * tl.load(sines + at, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def _prepared(  # type: ignore[no-untyped-def]
    a, c, weight, cosines, sines, frames, rows_inside,
    P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Queries or keys normalised and turned, in their own type."""
    dtype = a.dtype
    a, c = a.to(tl.float32), c.to(tl.float32)
    if HAS_NORM:
        left, right = tl.arange(0, A), A + tl.arange(0, C)
        rrms = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(c * c, 1)) / P + EPS)
        a = a * rrms[:, None] * tl.load(weight + left).to(tl.float32)[None, :]
        c = c * rrms[:, None] * tl.load(weight + right, mask=right < P, other=0.0).to(tl.float32)[None, :]
    if HAS_ROPE:
        pairs, more = tl.arange(0, A // 2), A // 2 + tl.arange(0, C // 2)
        at = frames[:, None] * (P // 2)
        a = _turned(a, cosines, sines, at + pairs[None, :], rows_inside[:, None], 1)
        c = _turned(c, cosines, sines, at + more[None, :], rows_inside[:, None] & (more < P // 2)[None, :], 1)
    return a.to(dtype), c.to(dtype)


@triton.jit
def _prepare_part(  # type: ignore[no-untyped-def]
    source, target, weight, cosines, sines, frames, inside,
    P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    a, c = load_rows(source, inside, P, A, C)
    a, c = _prepared(a, c, weight, cosines, sines, frames, inside, P, A, C, EPS, HAS_NORM, HAS_ROPE)
    store_rows(target, a, c, inside, P, A, C)


@triton.jit
def _unprepare_part(  # type: ignore[no-untyped-def]
    source, target, weight, cosines, sines, frames, inside,
    P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
):  # fmt: skip
    """Puts the gradient of queries or keys before :func:`_prepared` in the place of that after it.

    Returns what the gradient of the norm's weight sums up.
    """
    da, dc = load_rows(target, inside, P, A, C)
    da, dc = da.to(tl.float32), dc.to(tl.float32)
    if HAS_ROPE:
        pairs, more = tl.arange(0, A // 2), A // 2 + tl.arange(0, C // 2)
        at = frames[:, None] * (P // 2)
        da = _turned(da, cosines, sines, at + pairs[None, :], inside[:, None], -1)
        dc = _turned(dc, cosines, sines, at + more[None, :], inside[:, None] & (more < P // 2)[None, :], -1)
    a_along, c_along = da, dc
    if HAS_NORM:
        left, right = tl.arange(0, A), A + tl.arange(0, C)
        a_hat, c_hat = load_rows(source, inside, P, A, C)
        a_hat, c_hat = a_hat.to(tl.float32), c_hat.to(tl.float32)
        wa = da * tl.load(weight + left).to(tl.float32)[None, :]
        wc = dc * tl.load(weight + right, mask=right < P, other=0.0).to(tl.float32)[None, :]
        a_squares, a_product = tl.reduce((a_hat * a_hat, a_hat * wa), 1, _add_both)
        c_squares, c_product = tl.reduce((c_hat * c_hat, c_hat * wc), 1, _add_both)
        rrms = tl.rsqrt((a_squares + c_squares) / P + EPS)
        mean = rrms * (a_product + c_product) / P
        a_hat, c_hat = a_hat * rrms[:, None], c_hat * rrms[:, None]
        a_along, c_along = da * a_hat, dc * c_hat
        da = (wa - a_hat * mean[:, None]) * rrms[:, None]
        dc = (wc - c_hat * mean[:, None]) * rrms[:, None]
    store_rows(target, da, dc, inside, P, A, C)
    return a_along, c_along


@triton.jit
def _store_sums(at, a, c, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    right = A + tl.arange(0, C)
    tl.store(at + tl.arange(0, A), tl.sum(a, 0))
    tl.store(at + right, tl.sum(c, 0), mask=right < P)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    rows, num_sequences, S, T: tl.constexpr, H: tl.constexpr, P: tl.constexpr, G: tl.constexpr
):
    """For rows of the tile: their sequence in the tile, frame, token, offset of their head, and whether they exist."""
    group, frame = rows % G, rows // G
    sequence = tl.program_id(0).to(tl.int64) * G + group
    inside = (frame < T) & (sequence < num_sequences)
    head, place = sequence % H, sequence // H
    token = ((place // S) * T + frame) * S + place % S
    return group, frame, token, head * P, inside


@triton.jit
def _softmax(  # type: ignore[no-untyped-def]
    qa, qc, ka, kc, group, frame, scale, T: tl.constexpr, PRECISION: tl.constexpr
):
    scores = dot(qa, tl.trans(ka), PRECISION) + dot(qc, tl.trans(kc), PRECISION)
    same = (group[:, None] == group[None, :]) & (frame < T)[None, :]
    scores = tl.where(same, scores * (scale * 1.4426950408889634), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, q_norm, k_norm, cosines, sines, out, num_sequences, S, scale,
    T: tl.constexpr, H: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    group, frame, token, head, inside = _place(tl.arange(0, ROWS), num_sequences, S, T, H, P, G)
    at = qkv + token * (3 * H * P) + head
    qa, qc = load_rows(at, inside, P, A, C)
    ka, kc = load_rows(at + H * P, inside, P, A, C)
    va, vc = load_rows(at + 2 * H * P, inside, P, A, C)
    if Q_NORM or HAS_ROPE:
        qa, qc = _prepared(qa, qc, q_norm, cosines, sines, frame, inside, P, A, C, EPS, Q_NORM, HAS_ROPE)
    if K_NORM or HAS_ROPE:
        ka, kc = _prepared(ka, kc, k_norm, cosines, sines, frame, inside, P, A, C, EPS, K_NORM, HAS_ROPE)
    weights = _softmax(qa, qc, ka, kc, group, frame, scale, T, PRECISION).to(va.dtype)
    store_rows(out + token * (H * P) + head, dot(weights, va, PRECISION), dot(weights, vc, PRECISION), inside, P, A, C)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, qkv, q_norm, k_norm, cosines, sines, qkv_grad, norm_grads, num_sequences, S, scale,
    T: tl.constexpr, H: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if Q_NORM or K_NORM or HAS_ROPE:
        for first in range(0, ROWS, PART_ROWS):
            _, frames, tokens, heads, there = _place(first + tl.arange(0, PART_ROWS), num_sequences, S, T, H, P, G)
            source = qkv + tokens * (3 * H * P) + heads
            target = qkv_grad + tokens * (3 * H * P) + heads
            _prepare_part(source, target, q_norm, cosines, sines, frames, there, P, A, C, EPS, Q_NORM, HAS_ROPE)
            source, target = source + H * P, target + H * P
            _prepare_part(source, target, k_norm, cosines, sines, frames, there, P, A, C, EPS, K_NORM, HAS_ROPE)
        tl.debug_barrier()  # what other threads stored is read
    group, frame, token, head, inside = _place(tl.arange(0, ROWS), num_sequences, S, T, H, P, G)
    at = qkv + token * (3 * H * P) + head
    to = qkv_grad + token * (3 * H * P) + head
    prepared = to if Q_NORM or K_NORM or HAS_ROPE else at
    qa, qc = load_rows(prepared, inside, P, A, C)
    ka, kc = load_rows(prepared + H * P, inside, P, A, C)
    va, vc = load_rows(at + 2 * H * P, inside, P, A, C)
    oa, oc = load_rows(grad + token * (H * P) + head, inside, P, A, C)
    weights = _softmax(qa, qc, ka, kc, group, frame, scale, T, PRECISION)
    by_key = tl.trans(weights.to(va.dtype))
    store_rows(to + 2 * H * P, dot(by_key, oa, PRECISION), dot(by_key, oc, PRECISION), inside, P, A, C)
    weights_grad = dot(oa, tl.trans(va), PRECISION) + dot(oc, tl.trans(vc), PRECISION)
    # float32 sums over the row take the place of sum(grad * out), so that the output is not read
    scores_grad = weights * (weights_grad - tl.sum(weights * weights_grad, 1)[:, None]) * scale
    scores_grad = scores_grad.to(va.dtype)
    store_rows(to, dot(scores_grad, ka, PRECISION), dot(scores_grad, kc, PRECISION), inside, P, A, C)
    by_key = tl.trans(scores_grad)
    store_rows(to + H * P, dot(by_key, qa, PRECISION), dot(by_key, qc, PRECISION), inside, P, A, C)
    if Q_NORM or K_NORM or HAS_ROPE:
        tl.debug_barrier()
        qa_sum, qc_sum = tl.zeros((PART_ROWS, A), tl.float32), tl.zeros((PART_ROWS, C), tl.float32)
        ka_sum, kc_sum = tl.zeros((PART_ROWS, A), tl.float32), tl.zeros((PART_ROWS, C), tl.float32)
        for first in range(0, ROWS, PART_ROWS):
            _, frames, tokens, heads, there = _place(first + tl.arange(0, PART_ROWS), num_sequences, S, T, H, P, G)
            source = qkv + tokens * (3 * H * P) + heads
            target = qkv_grad + tokens * (3 * H * P) + heads
            a, c = _unprepare_part(
                source, target, q_norm, cosines, sines, frames, there, P, A, C, EPS, Q_NORM, HAS_ROPE
            )
            qa_sum, qc_sum = qa_sum + a, qc_sum + c
            source, target = source + H * P, target + H * P
            a, c = _unprepare_part(
                source, target, k_norm, cosines, sines, frames, there, P, A, C, EPS, K_NORM, HAS_ROPE
            )
            ka_sum, kc_sum = ka_sum + a, kc_sum + c
        sums = norm_grads + tl.program_id(0).to(tl.int64) * (2 * P)
        if Q_NORM:
            _store_sums(sums, qa_sum, qc_sum, P, A, C)
        if K_NORM:
            _store_sums(sums + P, ka_sum, kc_sum, P, A, C)


Types = tuple[torch.dtype | None, ...]
"""Of the norms of queries and of keys, of cosines and of sines; None for what there is not."""


def _types(*tensors: Tensor | None) -> Types:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


@lru_cache(maxsize=1024)
def _launch(
    kernel: Any, _device: torch.device, dtype: torch.dtype, shape: torch.Size, types: Types
) -> tuple[Launch, int]:
    """Returns the launch, and its number of programs."""
    B, T, S, _, H, P = shape
    q_norm, k_norm, rope, _ = (each is not None for each in types)
    group = TILE_ROWS // T
    programs = triton.cdiv(B * S * H, group)
    is_held = kernel is _backward and (q_norm or k_norm) and head_parts(P) == (64, 16) and dtype.itemsize == 2
    launch = Launch(
        kernel,
        (programs,),
        (B * S * H, S, 1 / math.sqrt(P)),
        (T, H, P, *head_parts(P), group, TILE_ROWS, RMS_NORM_EPS, q_norm, k_norm, rope, precision(dtype)),
        num_warps=WARPS_OF_LARGE_PRODUCTS if T > 32 and not (q_norm or k_norm or rope) else WARPS,
        **at_most(BACKWARD_REGISTERS, triton.__version__) if is_held else {},
    )  # fmt: skip
    return launch, programs


def forward(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cosines: Tensor | None, sines: Tensor | None
) -> Tensor:
    """Returns the attention (B, T, S, H, P) of contiguous ``qkv`` (B, T, S, 3, H, P)."""
    B, T, S, _, H, P = shape = qkv.shape
    out = qkv.new_empty((B, T, S, H, P))
    launch, _ = _launch(_forward, qkv.device, qkv.dtype, shape, _types(q_norm, k_norm, cosines, sines))
    launch(qkv, q_norm, k_norm, cosines, sines, out)
    return out


def backward(
    grad: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cosines: Tensor | None,
    sines: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of ``qkv``, and of the norms' weights (2, P), float32; None without norms."""
    shape = qkv.shape
    launch, programs = _launch(_backward, qkv.device, qkv.dtype, shape, _types(q_norm, k_norm, cosines, sines))
    qkv_grad, norm_grads = torch.empty_like(qkv), None
    has_norms = q_norm is not None or k_norm is not None
    if has_norms or cosines is not None:
        norm_grads = qkv.new_empty((programs if has_norms else 0, 2, shape[-1]), dtype=torch.float32)
    launch(grad, qkv, q_norm, k_norm, cosines, sines, qkv_grad, norm_grads)
    return qkv_grad, norm_grads.sum(0) if norm_grads is not None and has_norms else None
