"""What becomes of a step for which a device has too little memory: one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import InputError

_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In what CUDA, its libraries and NCCL say, whose errors have no type of their own."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it took the place of, is that a GPU's memory ran out.

    Where that happens while a CUDA graph is recorded, ending the recording fails after it, with another error.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def enough_memory(*, step: int, rank: int, latents: tuple[int, ...], graphs: bool) -> Iterator[None]:
    """Within it, memory that runs out is one line.

    The rank that has it cannot ask the others: they are in the middle of the step and wait for it.

    Args:
        step: Which is taken, from 1.
        rank: Whose device it is.
        latents: Shape of this rank's, (B, C, T, H, W).
        graphs: Whether passes run as CUDA graphs.

    Raises:
        InputError: if it runs out.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        size = "x".join(map(str, latents[2:]))
        parts = "leave --cuda-graphs out" if graphs else "--gradient-accumulation"  # they do not go together
        raise InputError(
            f"step {step}: the device of rank {rank} has too little memory for {latents[0]} samples with latents of "
            f"{size}: use a smaller --batch-size, {parts}, --activation-checkpointing auto or full, more ranks, or "
            "leave the bucket out by --buckets; see --dry-run"
        ) from error
