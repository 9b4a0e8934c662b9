"""How many frames a forward pass of an autoencoder may take."""

from collections.abc import Callable
from typing import Any

import torch

from shared.spec import Bucket

_ENOUGH_PIXELS = 16 * 512 * 512
"""More in a pass gains nothing: SD on an H200 made 450 frames/s of 512x512 with 16 a pass, 432 with 64."""
_MEMORY_SHARE = 0.6
"""Of the free memory, for one pass: the rest is for other buckets, other encoders and fragmentation."""


@torch.inference_mode()
def find_micro_batch(encode: Callable[[int], Any], bucket: Bucket, *, device: torch.device) -> int:
    """Returns how many frames of a bucket go through at once: a power of two, by trial.

    Args:
        encode: Encodes blank frames, so many at once.
        bucket: The size of the frames.
        device: The GPU.
    """
    frames = found = 1
    with torch.compiler.set_stance("force_eager"):  # trials need no code of their own
        while frames * bucket.height * bucket.width <= _ENOUGH_PIXELS:
            torch.cuda.empty_cache()
            allowed = torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            try:
                encode(frames)
            except torch.OutOfMemoryError:
                break
            if torch.cuda.max_memory_allocated(device) - before > allowed:
                break
            frames, found = frames * 2, frames
    torch.cuda.empty_cache()
    return found
