"""Gated residuals with modulated norms as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Where nobody asks for that, the
kernels are launched without the operator, whose way through the dispatcher takes several times as long as the launch.
Triton is imported on a GPU only.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from train.ops.float8 import Float8Rows
from train.ops.launching import entry, launches_directly
from train.ops.parcels import ordered_shape, parcelled_shape

LAYER_NORM_EPS = 1e-6

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The residual, if something is added; its modulated norm and the statistics of its rows, if there is a norm."""


@cache
def _kernels() -> ModuleType:
    from train.ops import modulation_kernels

    return modulation_kernels


@torch.library.custom_op("latentmill_modulation::modulated_residual", mutates_args=())
def _modulated_residual(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, parcels: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    residual, out, statistics = _kernels().forward(x, h, gate, shift, scale, None, parcels)
    return (
        x.new_empty(0) if residual is None else residual,
        x.new_empty(0) if out is None else out,
        x.new_empty(0, dtype=torch.float32) if statistics is None else statistics,
    )


@_modulated_residual.register_fake
def _(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, parcels: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = ordered_shape(x.shape)
    read_next = shape if parcels is None else parcelled_shape(shape, parcels)
    return (
        x.new_empty(0 if h is None else read_next if shift is None else shape),
        x.new_empty(0 if shift is None else read_next),
        x.new_empty(0 if shift is None else x.numel() // x.shape[-1] * 2, dtype=torch.float32),
    )


@torch.library.custom_op("latentmill_modulation::modulated_residual_backward", mutates_args=())
def _modulated_residual_backward(
    residual_grad: Tensor | None,
    out_grad: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    x_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    x_grad, h_grad, grads = _kernels().backward(
        residual_grad, None, out_grad, residual, statistics, h, gate, scale, tuple(x_shape)
    )
    return (
        grads.new_empty(0) if x_grad is None else x_grad,
        grads.new_empty(0) if h_grad is None else h_grad,
        grads,
    )


@_modulated_residual_backward.register_fake
def _(
    residual_grad: Tensor | None,
    out_grad: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    x_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    like = residual_grad if out_grad is None else out_grad
    modulation = gate if scale is None else scale
    assert like is not None
    assert modulation is not None
    num_sums = (2 if scale is not None else 0) + (1 if gate is not None else 0)
    has_x_grad = scale is not None or len(x_shape) != like.ndim
    return (
        like.new_empty(x_shape) if has_x_grad else modulation.new_empty(0),
        modulation.new_empty(0) if gate is None or h is None else torch.empty_like(h),
        modulation.new_empty((num_sums, *modulation.shape)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, h, gate, shift, scale, _parcels = inputs
    ctx.set_materialize_grads(False)
    ctx.x_shape = x.shape
    ctx.has_h, ctx.has_norm = h is not None, shift is not None
    read_by_norm = None if shift is None else x if h is None else output[0]
    ctx.save_for_backward(
        read_by_norm, output[2] if shift is not None else None, None if gate is None else h, gate, scale
    )


def _differentiate(
    ctx: Any, residual_grad: Tensor | None, out_grad: Tensor | None, _statistics_grad: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, residual_grad, None, out_grad), None


def _gradients(
    ctx: Any, residual_grad: Tensor | None, branch_grad: Tensor | None, out_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    residual, statistics, h, gate, scale = ctx.saved_tensors  # once: checkpointing allows no second look
    if residual_grad is None:
        residual_grad, branch_grad = branch_grad, None
    incoming = None if residual_grad is None or not ctx.has_h else residual_grad.contiguous()
    branch_grad = None if branch_grad is None else branch_grad.contiguous()
    out_grad = None if out_grad is None or not ctx.has_norm else out_grad.contiguous()
    like = incoming if out_grad is None else out_grad
    if like is None:
        return None, None, None, None, None
    if gate is None and out_grad is None:
        incoming = like if branch_grad is None else like + branch_grad
        return incoming, incoming, None, None, None
    read, scale = (residual, statistics, h, gate), None if out_grad is None else scale
    if launches_directly(like):
        of_x, of_h, grads = _kernels().backward(incoming, branch_grad, out_grad, *read, scale, ctx.x_shape)
    else:
        incoming = incoming if branch_grad is None else incoming + branch_grad  # type: ignore[operator]
        of_x, of_h, grads = _modulated_residual_backward(incoming, out_grad, *read, scale, ctx.x_shape)
        of_x = of_x if of_x.numel() else None
    x_grad = incoming if of_x is None else of_x
    shift_grad, scale_grad = (None, None) if out_grad is None else (grads[0], grads[1])
    if gate is not None:
        return x_grad, of_h, grads[-1], shift_grad, scale_grad
    return x_grad, x_grad if ctx.has_h else None, None, shift_grad, scale_grad


_modulated_residual.register_autograd(_differentiate, setup_context=_keep)


class _ModulatedResidual(torch.autograd.Function):
    """The same without the operator, with the residual for two who read it: one kernel adds their gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Float8Rows | None, parcels: int | None, *inputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        output = _kernels().forward(*inputs, rows, parcels)
        _keep(ctx, (*inputs, parcels), output)
        residual = output[0]
        return residual, None if residual is None else residual.view(residual.shape), output[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, *grads)


_directly = entry(_ModulatedResidual)


def modulated_residual(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Float8Rows | None = None,
    parcels: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``x + gate * h`` twice, and the modulated norm of it.

    The sum is not to be read without h, the norm not without shift and scale. Whoever reads the sum at two places takes
    one each, so that nobody has to add the gradients in a pass of its own.

    ``rows`` is room for the norm, or without one for the sum, in 8 bits: only where kernels are launched directly, or x
    has no content. With ``parcels`` the same lies in so many; x and h may lie in as many, but for an x with a norm, and
    with a gate alone.

    Raises:
        TypeError: if x and h are of two types; those of the modulation may be of others.
    """
    if h is not None and h.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and what is added to it {h.dtype}: the kernels take one type; convert one")
    x, h = x.contiguous(), None if h is None else h.contiguous()
    if launches_directly(x):
        return _directly(rows, parcels, x, h, gate, shift, scale)
    assert rows is None or x.is_meta
    residual, out, _ = _modulated_residual(x, h, gate, shift, scale, parcels)
    return residual, residual, out
