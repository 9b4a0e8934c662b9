"""Launching a kernel again at a size that it had before, at the cost of the launch alone.

Triton looks at every argument of every launch to find the compiled kernel. In a training step the sizes are those of
the step before, so here all that the choice depends on, but where tensors begin, is fixed once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_ALIGNMENT = 16
"""Bytes: where all tensors begin at multiples of it, Triton compiles loads of as many."""


def launches_directly(x: Tensor) -> bool:
    """Whether kernels may be launched without PyTorch's dispatcher knowing.

    It must know when it compiles a graph, when a mode looks on (selective checkpointing is one), and when tensors have
    no content.
    """
    return not (torch.compiler.is_compiling() or x.is_meta or _get_current_dispatch_mode() is not None)


class Launch:
    """A kernel with all but its tensors: numbers, constants, grid.

    Args:
        kernel: A Triton function whose parameters are tensors, then numbers, then constants.
        grid: The programs along each axis.
        numbers: Of integers and floats, in the order of the parameters.
        constants: The values of the ``tl.constexpr`` parameters, in their order.
        options: ``num_warps`` and the like.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._rest = (*numbers, *constants)
        self._options = options
        self._again: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launches the kernel. Which tensors are None, and their types, must be the same each time."""
        begins = 0
        for tensor in tensors:
            if tensor is not None:
                begins |= tensor.data_ptr()
        if begins % _ALIGNMENT:  # another kernel, which Triton finds
            self._kernel[self._grid](*tensors, *self._rest, **self._options)
        elif self._again is None:
            compiled = self._kernel[self._grid](*tensors, *self._rest, **self._options)
            self._again = None if compiled is None else compiled[self._grid]  # None from Triton's interpreter
        else:
            self._again(*tensors, *self._rest)
