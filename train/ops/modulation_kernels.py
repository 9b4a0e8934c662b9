"""The Triton kernels of LayerNorm with modulation and of gated residuals: one pass forward, one pass backward.

The forward pass keeps what autograd has anyway (the residual that the norm reads, the gated input) and two statistics
of each row. The gradients of shift, scale and gate are sums over the tokens of a group: each program sums its own rows
in registers, the few sums of the programs are added in a fixed order, so equal inputs give equal gradients. Rows may be
read and written where they lie in parcels (:mod:`train.ops.parcels`); programs share them in order all the same.

Letters: B batch, T frames, S tokens of a frame, D width, A + C its two parts; G groups of a sample, R rows at a time.
"""

from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.registers import at_most
from train.ops.float8 import Float8Rows
from train.ops.float8_kernels import store_converted
from train.ops.launching import Launch
from train.ops.modulation_op import LAYER_NORM_EPS
from train.ops.parcels import ordered_shape, parcelled_shape
from train.ops.partial_sums_kernels import add_partial_sums
from train.ops.row_tiles import load_rows, load_vector, row_parts, store_rows, store_vector

FORWARD_ROWS, FORWARD_WARPS = 2, 1
FORWARD_REGISTERS = 128
"""With a norm 1,152 wide: newer Tritons take up to 138, which leave 12 programs on a multiprocessor, not 16."""
BACKWARD_WARPS = 2
_PROGRAMS = 2112
"""About as many in the backward pass: sixteen for each of Hopper's 132 multiprocessors."""


@triton.jit
def _add_both(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b + d


@triton.jit
def _in_parcels(row, b, g, group_frames, G, S, s, B):  # type: ignore[no-untyped-def]
    """Where the rows of group ``g`` of sample ``b`` lie in parcels of ``s`` places: see :mod:`train.ops.parcels`."""
    frame, place = g * group_frames + row // S, row % S
    return ((place // s * (group_frames * G) + frame) * B + b) * s + place % s


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, h, gate, shift, scale, residual, out, statistics, values, scales, group_rows, G,
    gate_b, gate_g, shift_b, shift_g, scale_b, scale_g, group_frames, S, s, B,
    D: tl.constexpr, A: tl.constexpr, C: tl.constexpr, R: tl.constexpr, EPS: tl.constexpr,
    HAS_H: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, IN_8_BITS: tl.constexpr,
    X_PARCELLED: tl.constexpr, H_PARCELLED: tl.constexpr,
    RESIDUAL_PARCELLED: tl.constexpr, OUT_PARCELLED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(group_rows, R)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, g = (group // G).to(tl.int64), group % G
    row = tile * R + tl.arange(0, R)
    inside = row < group_rows
    offset = (group.to(tl.int64) * group_rows + row) * D
    parcelled = offset
    if X_PARCELLED or H_PARCELLED or RESIDUAL_PARCELLED or OUT_PARCELLED:
        parcelled = _in_parcels(row, b, g, group_frames, G, S, s, B) * D
    a, c = load_rows(x + (parcelled if X_PARCELLED else offset), inside, D, A, C)
    if HAS_H:
        ha, hc = load_rows(h + (parcelled if H_PARCELLED else offset), inside, D, A, C)
        if HAS_GATE:
            gate_a, gate_c = load_vector(gate + b * gate_b + g * gate_g, D, A, C)
            ha, hc = ha * gate_a[None, :], hc * gate_c[None, :]
        a, c = a + ha, c + hc
        store_rows(residual + (parcelled if RESIDUAL_PARCELLED else offset), a, c, inside, D, A, C)
        dtype = residual.dtype.element_ty
        a, c = a.to(dtype).to(tl.float32), c.to(dtype).to(tl.float32)  # as the backward pass will read it
    if HAS_NORM:
        mean = (tl.sum(a, 1) + tl.sum(c, 1)) / D
        a, c = a - mean[:, None], tl.where((A + tl.arange(0, C) < D)[None, :], c - mean[:, None], 0.0)
        over_deviation = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(c * c, 1)) / D + EPS)
        a, c = a * over_deviation[:, None], c * over_deviation[:, None]
        to = statistics + (group.to(tl.int64) * group_rows + row) * 2
        tl.store(to, mean, mask=inside)
        tl.store(to + 1, over_deviation, mask=inside)
        scale_a, scale_c = load_vector(scale + b * scale_b + g * scale_g, D, A, C)
        shift_a, shift_c = load_vector(shift + b * shift_b + g * shift_g, D, A, C)
        a = a * (1 + scale_a)[None, :] + shift_a[None, :]
        c = c * (1 + scale_c)[None, :] + shift_c[None, :]
        store_rows(out + (parcelled if OUT_PARCELLED else offset), a, c, inside, D, A, C)
        dtype = out.dtype.element_ty
        a, c = a.to(dtype).to(tl.float32), c.to(dtype).to(tl.float32)
    if IN_8_BITS:
        store_converted(values, scales, group.to(tl.int64) * group_rows + row, a, c, inside, D, A, C)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    residual_grad, branch_grad, out_grad, residual, statistics, h, gate, scale, x_grad, h_grad, sums,
    group_rows, G, chunk_rows, gate_b, gate_g, scale_b, scale_g, sums_of_one, group_frames, S, s, B,
    D: tl.constexpr, A: tl.constexpr, C: tl.constexpr,
    HAS_RESIDUAL_GRAD: tl.constexpr, HAS_BRANCH_GRAD: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_X_GRAD: tl.constexpr, X_PARCELLED: tl.constexpr, H_PARCELLED: tl.constexpr, RESIDUAL_PARCELLED: tl.constexpr,
    OUT_PARCELLED: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(group_rows, chunk_rows)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    b, g = (group // G).to(tl.int64), group % G
    first, end = chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, group_rows)
    start = group.to(tl.int64) * group_rows
    if HAS_NORM:
        scale_a, scale_c = load_vector(scale + b * scale_b + g * scale_g, D, A, C)
        shift_sum_a, shift_sum_c = tl.zeros((A,), tl.float32), tl.zeros((C,), tl.float32)
        scale_sum_a, scale_sum_c = tl.zeros((A,), tl.float32), tl.zeros((C,), tl.float32)
    if HAS_GATE:
        gate_a, gate_c = load_vector(gate + b * gate_b + g * gate_g, D, A, C)
        gate_sum_a, gate_sum_c = tl.zeros((A,), tl.float32), tl.zeros((C,), tl.float32)
    for row in range(first, end):
        offset = (start + row) * D
        parcelled = offset
        if X_PARCELLED or H_PARCELLED or RESIDUAL_PARCELLED or OUT_PARCELLED:
            b_32 = b.to(tl.int32)  # takes fewer registers here, and more in the forward pass
            parcelled = _in_parcels(row, b_32, g, group_frames, G, S, s, B).to(tl.int64) * D
        residual_at = parcelled if RESIDUAL_PARCELLED else offset
        h_at = parcelled if H_PARCELLED else offset
        if HAS_RESIDUAL_GRAD:
            da, dc = load_vector(residual_grad + residual_at, D, A, C)
        else:
            da, dc = tl.zeros((A,), tl.float32), tl.zeros((C,), tl.float32)
        if HAS_BRANCH_GRAD:
            branch_a, branch_c = load_vector(branch_grad + residual_at, D, A, C)
            da, dc = da + branch_a, dc + branch_c
        if HAS_GATE:
            ha, hc = load_vector(h + h_at, D, A, C)
        if HAS_NORM:
            ya, yc = load_vector(out_grad + (parcelled if OUT_PARCELLED else offset), D, A, C)
            xa, xc = load_vector(residual + offset, D, A, C)
            mean = tl.load(statistics + (start + row) * 2)
            over_deviation = tl.load(statistics + (start + row) * 2 + 1)
            # beyond the width xc is not 0, but yc is
            xa, xc = (xa - mean) * over_deviation, (xc - mean) * over_deviation
            shift_sum_a += ya
            shift_sum_c += yc
            scale_sum_a += ya * xa
            scale_sum_c += yc * xc
            ya, yc = ya * (1 + scale_a), yc * (1 + scale_c)
            # both sums in one exchange between the warps
            sum_left, along_left = tl.reduce((ya, ya * xa), 0, _add_both)
            sum_right, along_right = tl.reduce((yc, yc * xc), 0, _add_both)
            mean, along = (sum_left + sum_right) / D, (along_left + along_right) / D
            da += (ya - mean - xa * along) * over_deviation
            dc += (yc - mean - xc * along) * over_deviation
        if HAS_X_GRAD:
            store_vector(x_grad + (parcelled if X_PARCELLED else offset), da, dc, D, A, C)
        if HAS_GATE:
            gate_sum_a += da * ha
            gate_sum_c += dc * hc
            store_vector(h_grad + h_at, da * gate_a, dc * gate_c, D, A, C)
    to = sums + tl.program_id(0).to(tl.int64) * D
    if HAS_NORM:
        store_vector(to, shift_sum_a, shift_sum_c, D, A, C)
        store_vector(to + sums_of_one, scale_sum_a, scale_sum_c, D, A, C)
        to += 2 * sums_of_one
    if HAS_GATE:
        store_vector(to, gate_sum_a, gate_sum_c, D, A, C)


Shape = tuple[int, ...]
"""Of tokens, in order or in parcels."""
Modulation = tuple[torch.dtype, tuple[int, ...]] | None
"""What a kernel depends on of a shift, a scale or a gate: type and strides."""


def _described(values: Tensor | None) -> Modulation:
    return None if values is None else (values.dtype, values.stride())


def _strides(values: Modulation) -> tuple[int, int]:
    return (0, 0) if values is None else (values[1][0], values[1][1])


Order = tuple[tuple[int, int, int, int], tuple[bool, bool, bool, bool]]
"""Frames of a group, tokens of a frame, of one in a parcel, and samples; and whether x, what is added to it, their sum,
and its norm lie in parcels, or their gradients."""


def _order(shape: Shape, G: int, *shapes: Shape | None) -> Order:
    x, h, residual, out = (each is not None and len(each) == 5 for each in shapes)
    parcels = {each[0] for each in shapes if each is not None and len(each) == 5}
    if not parcels:
        return (0, 0, 0, 0), (False, False, False, False)
    (number,) = parcels
    return (shape[1] // G, shape[2], shape[2] // number, shape[0]), (x, h, residual, out)


def _groups(shape: Shape, G: int) -> tuple[int, int]:
    """Returns groups in all, and rows of a group."""
    groups = shape[0] * G
    return groups, prod(shape[:-1]) // max(1, groups)


@lru_cache(maxsize=1024)
def _forward_launch(
    _device: torch.device, dtype: torch.dtype, x: Shape, h: Shape | None, G: int, gate: Modulation, shift: Modulation,
    scale: Modulation, in_8_bits: bool, parcels: int | None,
) -> tuple[Launch, Shape, Shape]:  # fmt: skip
    """Returns the launch, and the shapes of the residual and of its norm."""
    shape = ordered_shape(x)
    read_next = shape if parcels is None else parcelled_shape(shape, parcels)
    residual, out = (read_next, shape) if shift is None else (shape, read_next)
    groups, rows = _groups(shape, G)
    has_h, has_norm = h is not None, shift is not None
    sizes, parcelled = _order(shape, G, x, h, residual if has_h else None, out if has_norm else None)
    is_held = has_norm and not in_8_bits and row_parts(shape[-1]) == (1024, 128) and dtype.itemsize == 2
    launch = Launch(
        _forward,
        (triton.cdiv(rows, FORWARD_ROWS) * groups,),  # along one axis: others take 65,535 at most
        (rows, G, *_strides(gate), *_strides(shift), *_strides(scale), *sizes),
        (shape[-1], *row_parts(shape[-1]), FORWARD_ROWS, LAYER_NORM_EPS,
         has_h, gate is not None, has_norm, in_8_bits, *parcelled),
        num_warps=FORWARD_WARPS,
        **at_most(FORWARD_REGISTERS, triton.__version__) if is_held else {},
    )  # fmt: skip
    return launch, residual, out


def forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    rows: Float8Rows | None = None, parcels: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns the residual (None without h), its modulated norm and the rows' statistics (None without shift).

    With ``rows``, the norm, or without one the residual, is written there too, in 8 bits; with ``parcels``, it lies in
    so many. x and h may lie in parcels too, but not an x of which there is a norm.
    """
    modulation = gate if shift is None else shift
    assert modulation is not None
    launch, residual_shape, out_shape = _forward_launch(
        x.device, x.dtype, x.shape, None if h is None else h.shape, modulation.shape[1],
        _described(gate), _described(shift), _described(scale), rows is not None, parcels,
    )  # fmt: skip
    residual = None if h is None else _empty(x, residual_shape)
    out = statistics = None
    if shift is not None:
        assert x.ndim == 4
        out = _empty(x, out_shape)
        statistics = x.new_empty(x.numel() // x.shape[-1] * 2, dtype=torch.float32)
    launch(x, h, gate, shift, scale, residual, out, statistics, *((None, None) if rows is None else rows))
    return residual, out, statistics


def _empty(like: Tensor, shape: Shape) -> Tensor:
    return torch.empty_like(like) if like.shape == shape else like.new_empty(shape)


@lru_cache(maxsize=1024)
def _backward_launch(
    _device: torch.device, _dtype: torch.dtype, residual: Shape | None, out: Shape | None, h: Shape | None,
    x: Shape | None, G: int, has_branch_grad: bool, gate: Modulation, scale: Modulation,
) -> tuple[Launch, Shape | None, tuple[int, int, int, int]]:  # fmt: skip
    """Returns the launch, the shape of x's gradient if it has one of its own, and that of what its programs sum: sums,
    groups, programs of a group, width."""
    like = out if residual is None else residual
    assert like is not None
    shape = ordered_shape(like)
    x = shape if x is None else x
    sizes, parcelled = _order(shape, G, x, h if gate is not None else None, residual, out)
    groups, rows = _groups(shape, G)
    D = shape[-1]
    chunk_rows = triton.cdiv(rows, max(1, _PROGRAMS // groups))
    chunks = triton.cdiv(rows, chunk_rows)
    num_sums = (2 if scale is not None else 0) + (1 if gate is not None else 0)
    has_x_grad = scale is not None or has_branch_grad or len(x) != len(like)
    launch = Launch(
        _backward,
        (chunks * groups,),
        (rows, G, chunk_rows, *_strides(gate), *_strides(scale), groups * chunks * D, *sizes),
        (D, *row_parts(D), residual is not None, has_branch_grad, gate is not None, scale is not None, has_x_grad,
         *parcelled),
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return launch, x if has_x_grad else None, (num_sums, groups, chunks, D)


def backward(
    residual_grad: Tensor | None, branch_grad: Tensor | None, out_grad: Tensor | None, residual: Tensor | None,
    statistics: Tensor | None, h: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    x_shape: tuple[int, ...] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Returns the gradients of x, of h, and of the modulation.

    That of x is None if it is the residual's, that of h without a gate. Those of the modulation are (1 to 3, B, G, D),
    of shift, scale and gate, in the type of those.

    Args:
        residual_grad: Gradient of the new residual, if anybody read it.
        branch_grad: Another one, to be added.
        out_grad: Gradient of the modulated norm, if there is one.
        residual: What the norm read.
        statistics: Of its rows.
        h: What was gated.
        gate: None if nothing was.
        scale: None without a norm.
        x_shape: Of x, in whichever order it lay; None: in order.
    """
    like = residual_grad if out_grad is None else out_grad
    modulation = gate if scale is None else scale
    assert like is not None
    assert modulation is not None
    launch, x_grad_shape, sums_shape = _backward_launch(
        like.device, like.dtype, None if residual_grad is None else residual_grad.shape,
        None if out_grad is None else out_grad.shape, None if h is None else h.shape, x_shape, modulation.shape[1],
        branch_grad is not None, _described(gate), _described(scale),
    )  # fmt: skip
    x_grad = None if x_grad_shape is None else _empty(like, x_grad_shape)
    h_grad = None if gate is None or h is None else torch.empty_like(h)
    num_sums, groups, chunks, D = sums_shape
    sums = like.new_empty((num_sums * groups, chunks, D), dtype=torch.float32)
    launch(residual_grad, branch_grad, out_grad, residual, statistics, h, gate, scale, x_grad, h_grad, sums)
    grads = modulation.new_empty((num_sums, groups // modulation.shape[1], modulation.shape[1], D))
    return x_grad, h_grad, add_partial_sums(sums, grads)
