"""Launching a kernel again at a size that it had before, at the cost of the launch alone.

Triton looks at every argument of every launch to find the compiled kernel. In a training step the sizes are those of
the step before, so here all that the choice depends on, but where tensors begin, is fixed once. What is left goes
straight to the C function that Triton has for a kernel: the Python in front of that takes longer than it does.
"""

from collections.abc import Callable
from copy import copy
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


def would_launch_directly(x: Tensor) -> bool:
    """Whether kernels are launched so, or would be if x had content: then a mode that only counts what is allocated, as
    its attribute ``counts_only`` says, is nobody who looks on."""
    if not x.is_meta:
        return launches_directly(x)
    mode = _get_current_dispatch_mode()
    return not torch.compiler.is_compiling() and (mode is None or getattr(mode, "counts_only", False))


def _told(compiled: Any, grid: tuple[int, ...]) -> tuple[tuple[Any, ...], bool] | None:
    """Asks Triton's launcher of a kernel what it gives the C function that launches it.

    That depends on the Triton. So a copy of the launcher, whose C function only listens, is called with marks in place
    of what differs from launch to launch.

    Returns:
        What comes after the grid and the stream and before the kernel's arguments, and whether those come as one tuple
        (from Triton 3.7 on) or each by itself (3.6). None if it is neither, or if a launch needs more than the
        function: scratch memory, or Triton's sanitiser.
    """
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    stream, arguments = object(), (object(), object())
    heard: list[tuple[Any, ...]] = []
    listener = copy(launcher)
    listener.launch = lambda *told: heard.append(told)
    listener(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    told = heard[0] if len(heard) == 1 else ()
    if told[:4] != (*grid, stream):
        return None
    if told[-1] == arguments:
        return told[4:-1], True
    return (told[4:-2], False) if told[-2:] == arguments else None


def _again(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Returns what launches a compiled kernel, given addresses for tensors, then its other arguments.

    Triton's own, if its inside is not as in 3.6 to 3.9, or if a launch needs more than the C function.
    """
    by_triton: Callable[..., None] = compiled[grid]  # keeps the kernel, which Triton 3.8 unloads when it is let go
    try:
        from triton import knobs
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.runtime.driver import driver

        if not isinstance(compiled.run, CudaLauncher) or (told := _told(compiled, grid)) is None:
            return by_triton
        launch, (fixed, together) = compiled.run.launch, told
        enter, leave = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
        stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()
    except (ImportError, AttributeError, TypeError):
        return by_triton
    x, y, z = grid

    def directly(*arguments: Any) -> None:
        if enter or leave:  # somebody's profiler wants to be called
            by_triton(*arguments)
        elif together:
            launch(x, y, z, stream_of(device), *fixed, arguments)
        else:
            launch(x, y, z, stream_of(device), *fixed, *arguments)

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
