"""Launching a kernel again at a size that it had before, at the cost of the launch alone.

Triton looks at every argument of every launch to find the compiled kernel. In a training step the sizes are those of
the step before, so here all that the choice depends on, but where tensors begin, is fixed once. What is left goes
straight to the C function that Triton has for a kernel: the Python in front of that takes longer than it does.
"""

from collections.abc import Callable
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


_BEFORE_ARGUMENTS = "iiiKKppOOOOOO"
"""What Triton 3.6's C functions take before a kernel's arguments: the grid's three axes, stream, kernel, whether its
programs wait for each other, whether it may begin before the last one ends, scratch memory of two kinds, metadata of
the kernel and of the launch, and what to call before and after."""


def _again(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Returns what launches a compiled kernel, given addresses for tensors, then its other arguments.

    Triton's own, if its inside is not as in 3.6 or the kernel needs scratch memory.
    """
    by_triton: Callable[..., None] = compiled[grid]
    try:
        from triton import knobs
        from triton.backends.nvidia.driver import _BASE_ARGS_FORMAT, CudaLauncher
        from triton.runtime.driver import driver

        launcher = compiled.run
        if not isinstance(launcher, CudaLauncher) or _BASE_ARGS_FORMAT != _BEFORE_ARGUMENTS:
            return by_triton
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return by_triton
        launch, kernel = launcher.launch, compiled.function
        how = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata)
        enter, leave = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
        stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()
    except (ImportError, AttributeError):
        return by_triton
    x, y, z = grid

    def directly(*arguments: Any) -> None:
        if enter or leave:  # somebody's profiler wants to be called
            by_triton(*arguments)
        else:
            launch(x, y, z, stream_of(device), kernel, *how, None, None, None, *arguments)

    return directly


def entry(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns ``function.apply`` without the Python in it, which is for ``torch.func`` and not for kernels.

    It is no way in for the compiler, which knows ``apply``.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


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
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launches the kernel. Which tensors are None, and their types, must be the same each time."""
        begins = 0
        addresses: list[int | None] = []
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                begins |= (address := tensor.data_ptr())
                addresses.append(address)
        if begins % _ALIGNMENT:  # another kernel, which Triton finds
            self._kernel[self._grid](*tensors, *self._rest, **self._options)
        elif self._again is None:
            compiled = self._kernel[self._grid](*tensors, *self._rest, **self._options)
            self._again = None if compiled is None else _again(compiled, self._grid)  # None from Triton's interpreter
        else:
            self._again(*addresses, *self._rest)
