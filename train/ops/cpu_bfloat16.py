"""bfloat16 products at float32 speed on processors without bfloat16 instructions.

There PyTorch computes a bfloat16 matrix product about a hundred times slower than a float32 one. Inside
:class:`Float32Products` the operands of products are widened to float32 and the result is rounded back. A bfloat16 unit
does the same: products of bfloat16 numbers, accumulated in float32, rounded once at the end. So nothing but the time
changes; attention alone keeps its probabilities in float32. Gradients follow from the casts, and are computed in
float32 and rounded as well.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        F.conv2d,
        F.conv3d,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        Tensor.matmul,
        Tensor.__matmul__,
    }
)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


class Float32Products(TorchFunctionMode):
    """Computes bfloat16 products in float32 and rounds the result."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func not in _PRODUCTS or not isinstance(first, Tensor) or first.dtype is not torch.bfloat16:
            return func(*args, **kwargs)
        widened = func(*(_widen(arg) for arg in args), **{name: _widen(value) for name, value in kwargs.items()})
        return widened.to(torch.bfloat16)


def checkpoint_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Returns the contexts of a checkpointed block's forward pass and of its recomputation: the same products in both.

    For ``torch.utils.checkpoint``'s ``context_fn``. PyTorch leaves such modes during the backward pass.
    """
    active = any(isinstance(mode, Float32Products) for mode in _get_current_function_mode_stack())
    return nullcontext(), Float32Products() if active else nullcontext()


def bfloat16_products(device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which to compute in bfloat16 on a device: none where the device has such products."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Float32Products()
    return nullcontext()
