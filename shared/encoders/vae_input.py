"""Bringing frames to the device."""

import numpy as np
import torch
from torch import Tensor

_SLOTS = 6
"""Passes on their way to a GPU, at most: 60 ms of small ones, for which a thread that launches them may be held up."""


class CpuInput:
    """Hands frames over on the CPU."""

    def wait(self) -> None:
        """Nothing is on its way to anywhere."""

    def put(self, frames: np.ndarray) -> Tensor:
        """Returns the frames, uint8."""
        return torch.tensor(frames)

    def taken(self) -> None:
        """What was put has been read."""


class GpuInput:
    """Brings frames to a GPU on a stream beside the one that computes, from pinned memory that is used again.

    The host waits here only for an upload of six passes before, that is when the GPU has work enough.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._slot, self._slots = 0, [_Slot(0, device) for _ in range(_SLOTS)]

    def wait(self) -> None:
        """Waits until frames can be put."""
        self._slots[self._slot].uploaded.synchronize()  # what was in this slot before

    def put(self, frames: np.ndarray) -> Tensor:
        """Returns the frames, uint8, on the GPU; the current stream waits for them. :meth:`wait` comes before."""
        if frames.nbytes > self._slots[self._slot].num_bytes:
            self._slots[self._slot] = _Slot(frames.nbytes, self._device)
        slot = self._slots[self._slot]
        pinned, on_device = slot.pinned[: frames.nbytes], slot.on_device[: frames.nbytes]
        np.copyto(pinned.view(frames.shape).numpy(), frames)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.taken)
            on_device.copy_(pinned, non_blocking=True)
            slot.uploaded.record(self._stream)
        torch.cuda.current_stream(self._device).wait_event(slot.uploaded)
        return on_device.view(frames.shape)

    def taken(self) -> None:
        """What was put is read by kernels that are launched: its memory is free after them."""
        self._slots[self._slot].taken.record(torch.cuda.current_stream(self._device))
        self._slot = (self._slot + 1) % _SLOTS


class _Slot:
    """Memory for the frames of one pass, on both sides."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.on_device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.uploaded, self.taken = torch.cuda.Event(), torch.cuda.Event()
        self.taken.record(torch.cuda.current_stream(device))  # new memory may still be in use by work of this stream
