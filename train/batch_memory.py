"""Memory for batches that worker processes fill and the trainer reads: allocated once, used again.

Fresh shared memory costs more than filling it, so a buffer goes back to its pool when nobody holds a tensor of it any
more, and only then: a consumer that keeps its batches makes the pool grow. On a GPU's machine buffers are pinned, and
one is filled again only after the copies out of it are done.
"""

import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.index_columns import Array

_ALIGNMENT = 4096
_CUDA_ERROR_MEMORY_ALLOCATION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How one rank's part of a batch lies in a buffer. B samples, L caption tokens, D caption channels."""

    batch_size: int
    latent_shape: tuple[int, int, int, int]
    caption_length: int
    caption_channels: int
    latent_dtype: torch.dtype
    caption_dtype: torch.dtype

    def tensors(self, buffer: Array) -> "BatchTensors":
        """Returns the parts of a buffer."""
        start = 0

        def part(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal start
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            tensor = torch.from_numpy(buffer[start : start + num_bytes]).view(dtype).view(shape)
            start += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            return tensor

        B, L = self.batch_size, self.caption_length
        return BatchTensors(
            latents=part((B, *self.latent_shape), self.latent_dtype),
            captions=part((B, L, self.caption_channels), self.caption_dtype),
            mask=part((B, L), torch.int64),
            u=part((B,), torch.float64),
            noise_keys=part((B,), torch.int64),
            drop_caption=part((B,), torch.bool),
            fps=part((B,), torch.float32),
            identity=part((B, 2), torch.int64),
        )

    @property
    def num_bytes(self) -> int:
        """What a buffer needs to hold."""
        B, L = self.batch_size, self.caption_length
        latents = B * int(np.prod(self.latent_shape)) * self.latent_dtype.itemsize
        captions = B * L * self.caption_channels * self.caption_dtype.itemsize
        return latents + captions + 8 * B * (L + 6) + 8 * _ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTensors:
    """One rank's part of a batch, in a buffer."""

    latents: Tensor
    """(B, C, T, H, W)."""
    captions: Tensor
    """(B, L, D)."""
    mask: Tensor
    """(B, L) int64."""
    u: Tensor
    """(B,) float64."""
    noise_keys: Tensor
    """(B,) int64."""
    drop_caption: Tensor
    """(B,) bool."""
    fps: Tensor
    """(B,) float32."""
    identity: Tensor
    """(B, 2) int64."""


class BatchBuffer:
    """Memory that several processes see: a file without a name, mapped."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, num_bytes)

    @classmethod
    def create(cls, num_bytes: int) -> "BatchBuffer":
        """Returns a new one. Its pages take memory only when they are first used."""
        descriptor = os.memfd_create("latentmill-batch", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_bytes)
        return cls(descriptor, num_bytes)

    def array(self) -> Array:
        """Returns its bytes."""
        return np.frombuffer(self.memory, np.uint8)


class BufferPool:
    """The buffers of one loader.

    Args:
        num_bytes: Of each.
        pin: Pin them for copies to a GPU.
    """

    def __init__(self, num_bytes: int, *, pin: bool) -> None:
        self.buffers: list[BatchBuffer] = []
        self._num_bytes, self._pin = num_bytes, pin
        self._free: deque[tuple[int, Any]] = deque()

    def take(self) -> int:
        """Returns the number of a buffer that nobody uses; a new one, the next number, if there is none."""
        if self._free:
            number, copied = self._free.popleft()
            if copied is not None:
                copied.synchronize()
            return number
        buffer = BatchBuffer.create(self._num_bytes)
        if self._pin:
            code = torch.cuda.cudart().cudaHostRegister(buffer.array().ctypes.data, self._num_bytes, 0)
            if int(code) == _CUDA_ERROR_MEMORY_ALLOCATION:
                raise MemoryError(f"{self._num_bytes:,} bytes for a batch cannot be pinned")
            assert int(code) == 0, f"cudaHostRegister: {code}"
        self.buffers.append(buffer)
        return len(self.buffers) - 1

    def lease(self, number: int) -> Array:
        """Returns the bytes of a buffer. It is free again when the last tensor made of them is gone."""
        array = self.buffers[number].array()
        weakref.finalize(array, self._give_back, number).atexit = False
        return array

    def close(self) -> None:
        """Lets go of the buffers. What of them is still in use stays until it is not."""
        for buffer in self.buffers:
            if self._pin:
                torch.cuda.cudart().cudaHostUnregister(buffer.array().ctypes.data)
            os.close(buffer.descriptor)
        self.buffers.clear()

    def _give_back(self, number: int) -> None:
        copied = None
        if self._pin:
            copied = torch.cuda.Event()
            copied.record()
        self._free.append((number, copied))
