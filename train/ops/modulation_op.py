"""Gated residuals with modulated norms as an operator of PyTorch's, with its gradient.

PyTorch knows it by name: it does not break a compiled graph, selective checkpointing can keep its result, and on
tensors without content it has the shapes, and keeps the memory, that it has on a GPU. Triton is imported there only.
"""

from typing import Any

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-6


@torch.library.custom_op("latentmill_modulation::modulated_residual", mutates_args=())
def _modulated_residual(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from train.ops import modulation_kernels as kernels

    return kernels.forward(x, h, gate, shift, scale)


@_modulated_residual.register_fake
def _(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(0) if h is None else torch.empty_like(x),
        x.new_empty(0) if shift is None else torch.empty_like(x),
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
) -> tuple[Tensor, Tensor, Tensor]:
    from train.ops import modulation_kernels as kernels

    return kernels.backward(residual_grad, out_grad, residual, statistics, h, gate, scale)


@_modulated_residual_backward.register_fake
def _(
    residual_grad: Tensor | None,
    out_grad: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None,
    h: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = residual_grad if out_grad is None else out_grad
    modulation = gate if scale is None else scale
    assert like is not None
    assert modulation is not None
    num_sums = (2 if scale is not None else 0) + (1 if gate is not None else 0)
    return (
        like.new_empty(0) if scale is None else torch.empty_like(like),
        like.new_empty(0) if gate is None else torch.empty_like(like),
        like.new_empty(num_sums, like.shape[0], modulation.shape[1], like.shape[-1], dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, h, gate, shift, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.has_h, ctx.has_norm = h is not None, shift is not None
    read_by_norm = None if shift is None else x if h is None else output[0]
    ctx.save_for_backward(
        read_by_norm, output[2] if shift is not None else None, None if gate is None else h, gate, scale
    )


def _differentiate(
    ctx: Any, residual_grad: Tensor | None, out_grad: Tensor | None, _statistics_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    residual, statistics, h, gate, scale = ctx.saved_tensors  # once: checkpointing allows no second look
    incoming = None if residual_grad is None or not ctx.has_h else residual_grad.contiguous()
    out_grad = None if out_grad is None or not ctx.has_norm else out_grad.contiguous()
    if incoming is None and out_grad is None:
        return None, None, None, None, None
    x_grad, h_grad, gate_grad, shift_grad, scale_grad = incoming, incoming, None, None, None
    if gate is not None or out_grad is not None:
        of_x, of_h, sums = _modulated_residual_backward(
            incoming, out_grad, residual, statistics, h, gate, None if out_grad is None else scale
        )
        if out_grad is not None:
            x_grad = h_grad = of_x
            shift_grad, scale_grad = sums[:2].to(scale.dtype).unbind(0)
        if gate is not None:
            h_grad, gate_grad = of_h, sums[-1].to(gate.dtype)
    return x_grad, h_grad if ctx.has_h else None, gate_grad, shift_grad, scale_grad


_modulated_residual.register_autograd(_differentiate, setup_context=_keep)


def modulated_residual(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns ``x + gate * h`` (empty without h) and the modulated norm of it (empty without shift and scale)."""
    x, h = x.contiguous(), None if h is None else h.contiguous()
    residual, out, _ = _modulated_residual(x, h, gate, shift, scale)
    return residual, out
