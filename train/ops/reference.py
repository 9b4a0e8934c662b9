"""Whether operations run as Triton kernels or as the plain PyTorch that the kernels are measured and tested against."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["modulation", "time", "captions", "gelu", "linear", "products", "qk_norm"]

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""``products`` is no kernel of ours, but which of cuBLASLt's runs in ``linear`` and ``gelu``."""

_left_out: frozenset[Kernel] = frozenset()


@contextmanager
def reference_operations(kernels: tuple[Kernel, ...] = KERNELS) -> Iterator[None]:
    """Within it, the named operations of this process run in plain PyTorch, on a GPU too."""
    global _left_out
    before, _left_out = _left_out, _left_out | frozenset(kernels)
    try:
        yield
    finally:
        _left_out = before


def kernel_wanted(kernel: Kernel, x: Tensor) -> bool:
    """Whether a kernel is to take x, if its size suits it. Tensors without content stand for those of a GPU."""
    if not (x.is_cuda or x.is_meta) or x.numel() == 0 or kernel in _left_out:
        return False
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32)
