"""What becomes of work for which a device or its host has too little memory: one line that says what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from shared.errors import InputError

Memory = Literal["device", "host"]

_OF_DEVICES = ("CUBLAS_STATUS_ALLOC_FAILED",)
_OF_HOSTS = ("DefaultCPUAllocator", "Cannot allocate memory")
_OF_EITHER = ("out of memory",)
"""In what PyTorch, CUDA, its libraries and NCCL say, whose errors have no type of their own."""
_SPARE_BYTES = 1 << 30
"""What CUDA and its libraries ask a device for besides PyTorch's allocator, which has an error of its own, is less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What memory is needed for, and what to do where there is too little."""

    doing: str
    """Such as ``step 3``."""
    wants: str
    """Such as ``4 samples``."""
    device_ways: str
    host_ways: str


def which_memory_ran_out(error: BaseException | None) -> Memory | None:
    """Returns whose memory ran out, as an error says, or one that it took the place of; None if it says no such thing.

    Where that happens while a CUDA graph is recorded, ending the recording fails after it, with another error. Of
    memory that CUDA pins on the host its error says no more than of the device's: then what is free there decides.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, torch.OutOfMemoryError):
            return "device"
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return "host"
        if isinstance(error, RuntimeError):
            text = str(error)
            if any(sign in text for sign in _OF_HOSTS):
                return "host"
            if any(sign in text for sign in _OF_DEVICES):
                return "device"
            if any(sign in text for sign in _OF_EITHER):
                return "host" if _free_on_device() > _SPARE_BYTES else "device"
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _free_on_device() -> int:
    """Returns the bytes free on this process's device; 0 where there is none, or it cannot be asked."""
    if not torch.cuda.is_initialized():
        return 0
    try:
        return torch.cuda.mem_get_info()[0]
    except RuntimeError:
        return 0


@contextmanager
def enough_memory(need: Need, *, rank: int) -> Iterator[None]:
    """Within it, memory that runs out is one line.

    The rank that has it cannot ask the others: they may be in the middle of the step and wait for it.

    Args:
        need: For what.
        rank: Whose memory it is.

    Raises:
        InputError: if it runs out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        memory = which_memory_ran_out(error)
        if memory is None:
            raise
        ways = need.device_ways if memory == "device" else need.host_ways
        raise InputError(
            f"{need.doing}: the {memory} of rank {rank} has too little memory for {need.wants}: {ways}"
        ) from error
