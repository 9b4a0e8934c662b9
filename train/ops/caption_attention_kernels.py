"""The Triton kernels of attention to captions: many queries, few keys, which lie padded and are read in place.

A sample's valid keys come first; how many there are is read on the device, so nothing is packed and nothing waits. Keys
of up to 128 tokens are one tile, which a program holds while it goes through its share of a sample's queries. The keys'
gradients of the shares are added in a fixed order: equal inputs give equal gradients.

Letters: B batch, N queries, M keys, H heads, P head width, A + C its two parts, R shares of the queries.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.ops.head_parts import head_parts, precision
from train.ops.head_tiles import dot, dot_add, load_rows, store_rows
from train.ops.launching import Launch
from train.ops.partial_sums_kernels import add_partial_sums

FORWARD_ROWS, FORWARD_WARPS, FORWARD_PROGRAMS = 64, 4, 528
BACKWARD_ROWS, BACKWARD_WARPS, BACKWARD_PROGRAMS = 64, 8, 264
"""About as many programs: four and two for each of Hopper's 132 multiprocessors."""
TILE_KEYS = 128
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _num_keys(borders, b, M, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The valid keys of sample b. Borders are those of all samples end to end: valid, padding, valid, ..."""
    if RAGGED:
        return tl.load(borders + 2 * b + 1) - tl.load(borders + 2 * b)
    return M


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, kv, borders, out, sums, N, M, scale, share_rows,
    H: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RAGGED: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    num_keys = _num_keys(borders, b, M, RAGGED)
    if ONE_TILE:
        valid = tl.arange(0, KEYS) < num_keys
        at = kv + ((b * M + tl.arange(0, KEYS)) * (2 * H) + h) * P
        ka, kc = load_rows(at, valid, P, A, C)
        va, vc = load_rows(at + H * P, valid, P, A, C)
    for row in range(share * share_rows, tl.minimum((share + 1) * share_rows, N), ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < N
        offset = ((b * N + rows) * H + h) * P
        qa, qc = load_rows(q + offset, inside, P, A, C)
        if ONE_TILE:
            scores = dot_add(qc, tl.trans(kc), dot(qa, tl.trans(ka), PRECISION), PRECISION) * (scale * _LOG2_E)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            greatest = tl.maximum(tl.max(scores, 1), -1e30)  # a sample without keys attends to nothing
            weights = tl.exp2(scores - greatest[:, None])
            total = tl.sum(weights, 1)
            weights = weights.to(va.dtype)
            oa, oc = dot(weights, va, PRECISION), dot(weights, vc, PRECISION)
        else:
            greatest, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
            oa, oc = tl.zeros((ROWS, A), tl.float32), tl.zeros((ROWS, C), tl.float32)
            for begin in range(0, num_keys, KEYS):
                keys = begin + tl.arange(0, KEYS)
                valid = keys < num_keys
                at = kv + ((b * M + keys) * (2 * H) + h) * P
                ka, kc = load_rows(at, valid, P, A, C)
                va, vc = load_rows(at + H * P, valid, P, A, C)
                scores = dot_add(qc, tl.trans(kc), dot(qa, tl.trans(ka), PRECISION), PRECISION) * (scale * _LOG2_E)
                scores = tl.where(valid[None, :], scores, float("-inf"))
                new = tl.maximum(greatest, tl.max(scores, 1))
                weights, shrunk = tl.exp2(scores - new[:, None]), tl.exp2(greatest - new)
                total, greatest = total * shrunk + tl.sum(weights, 1), new
                weights = weights.to(va.dtype)
                oa = dot_add(weights, va, oa * shrunk[:, None], PRECISION)
                oc = dot_add(weights, vc, oc * shrunk[:, None], PRECISION)
        some = total > 0
        total = tl.where(some, total, 1.0)
        store_rows(out + offset, oa / total[:, None], oc / total[:, None], inside, P, A, C)
        log_total = tl.where(some, greatest, 0.0) + tl.log2(total)
        tl.store(sums + tl.program_id(0).to(tl.int64) * N + rows, log_total, mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, q, kv, borders, out, sums, q_grad, kv_shares, N, M, scale, share_rows, B,
    H: tl.constexpr, P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RAGGED: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    num_keys = _num_keys(borders, b, M, RAGGED)
    first, end = share * share_rows, tl.minimum((share + 1) * share_rows, N)
    for begin in range(0, M, KEYS):
        keys = begin + tl.arange(0, KEYS)
        valid = keys < num_keys
        at = kv + ((b * M + keys) * (2 * H) + h) * P
        ka, kc = load_rows(at, valid, P, A, C)
        va, vc = load_rows(at + H * P, valid, P, A, C)
        dka, dkc = tl.zeros((KEYS, A), tl.float32), tl.zeros((KEYS, C), tl.float32)
        dva, dvc = tl.zeros((KEYS, A), tl.float32), tl.zeros((KEYS, C), tl.float32)
        # a tile of padding changes nothing, but without keys at all the queries' gradient must be written
        for row in range(first, tl.where((begin < num_keys) | (begin == 0), end, first), ROWS):
            rows = row + tl.arange(0, ROWS)
            inside = rows < end
            offset = ((b * N + rows) * H + h) * P
            qa, qc = load_rows(q + offset, inside, P, A, C)
            ga, gc = load_rows(grad + offset, inside, P, A, C)
            # by key and query, so that weights are operands of the next products as they are
            log_total = tl.load(sums + tl.program_id(0).to(tl.int64) * N + rows, mask=inside, other=0.0)
            scores = dot_add(kc, tl.trans(qc), dot(ka, tl.trans(qa), PRECISION), PRECISION) * (scale * _LOG2_E)
            weights = tl.where(valid[:, None], tl.exp2(scores - log_total[None, :]), 0.0)
            rounded = weights.to(ka.dtype)
            dva = dot_add(rounded, ga, dva, PRECISION)
            dvc = dot_add(rounded, gc, dvc, PRECISION)
            weights_grad = dot_add(vc, tl.trans(gc), dot(va, tl.trans(ga), PRECISION), PRECISION)
            if ONE_TILE:
                along = tl.sum(weights * weights_grad, 0)
            else:
                oa, oc = load_rows(out + offset, inside, P, A, C)
                along = tl.sum(oa.to(tl.float32) * ga.to(tl.float32), 1)
                along += tl.sum(oc.to(tl.float32) * gc.to(tl.float32), 1)
            scores_grad = (weights * (weights_grad - along[None, :]) * scale).to(ka.dtype)
            dka = dot_add(scores_grad, qa, dka, PRECISION)
            dkc = dot_add(scores_grad, qc, dkc, PRECISION)
            by_query = tl.trans(scores_grad)
            dqa, dqc = dot(by_query, ka, PRECISION), dot(by_query, kc, PRECISION)
            if not ONE_TILE and begin > 0:
                before_a, before_c = load_rows(q_grad + offset, inside, P, A, C)
                dqa, dqc = dqa + before_a, dqc + before_c
            store_rows(q_grad + offset, dqa, dqc, inside, P, A, C)
        to = kv_shares + (((share * B + b) * M + keys) * (2 * H) + h) * P
        store_rows(to, dka, dkc, keys < M, P, A, C)
        store_rows(to + H * P, dva, dvc, keys < M, P, A, C)


@lru_cache(maxsize=1024)
def _launch(
    kernel: Any,
    _device: torch.device,
    dtype: torch.dtype,
    queries: torch.Size,
    num_keys: int,
    borders: torch.dtype | None,
) -> tuple[Launch, int]:
    """Returns the launch, and how many programs share the queries of a head: about as many in all as there should be.

    Args:
        kernel: Of the forward or of the backward pass.
        queries: (B, N, H, P).
        num_keys: M.
        borders: Their type; None without.
    """
    B, N, H, P = queries
    is_forward = kernel is _forward
    rows, warps, programs = (
        (FORWARD_ROWS, FORWARD_WARPS, FORWARD_PROGRAMS)
        if is_forward
        else (BACKWARD_ROWS, BACKWARD_WARPS, BACKWARD_PROGRAMS)
    )
    share_rows = triton.cdiv(triton.cdiv(N, rows), max(1, programs // (B * H))) * rows
    num_shares = triton.cdiv(N, share_rows)
    keys = min(TILE_KEYS, max(16, triton.next_power_of_2(num_keys)))
    launch = Launch(
        kernel,
        (B * H, num_shares),  # in this order: the second axis takes 65,535 at most
        (N, num_keys, 1 / math.sqrt(P), share_rows, *(() if is_forward else (B,))),
        (H, P, *head_parts(P), rows, keys, borders is not None, keys >= num_keys, precision(dtype)),
        num_warps=warps,
        num_stages=2,
    )
    return launch, num_shares


def forward(q: Tensor, kv: Tensor, borders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the attention, as q, and the logarithms to base 2 of its denominators (B, H, N), float32."""
    B, N, H, _ = shape = q.shape
    launch, _ = _launch(_forward, q.device, q.dtype, shape, kv.shape[1], None if borders is None else borders.dtype)
    out, sums = torch.empty_like(q), q.new_empty((B, H, N), dtype=torch.float32)
    launch(q, kv, borders, out, sums)
    return out, sums


def backward(
    grad: Tensor, q: Tensor, kv: Tensor, borders: Tensor | None, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the queries, and of keys and values."""
    borders_type = None if borders is None else borders.dtype
    launch, num_shares = _launch(_backward, q.device, q.dtype, q.shape, kv.shape[1], borders_type)
    q_grad, kv_grad = torch.empty_like(q), torch.empty_like(kv)
    shares = kv.new_empty((1, num_shares, kv.numel()), dtype=torch.float32)
    launch(grad, q, kv, borders, out, sums, q_grad, shares)
    return q_grad, add_partial_sums(shares, kv_grad)
