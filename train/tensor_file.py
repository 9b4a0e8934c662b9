"""Safetensors files that are written one tensor at a time, so that no process ever holds all of them.

The format: eight bytes, little-endian, with the length of a JSON header; the header, which gives each tensor's dtype,
shape and place; the values. Source: https://github.com/huggingface/safetensors, section Format.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import torch
from torch import Tensor

from shared.stores.files import abandon_file, create_file, explained, sync_file

_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file holds, for whoever checks it later."""

    num_bytes: int
    crc32c: int

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Returns the record of what ``path`` holds now."""
        num_bytes, crc32c = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                num_bytes += len(chunk)
                crc32c = google_crc32c.extend(crc32c, chunk)
        return cls(num_bytes=num_bytes, crc32c=crc32c)


class TensorFile:
    """A new safetensors file of float32 tensors.

    Args:
        path: Must not exist.
        shapes: The tensors' shapes by name, in the order in which they will be added.

    Raises:
        StoreError: The file cannot be written; so do the methods.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._path, self._expected = path, [(name, torch.Size(shape)) for name, shape in shapes.items()]
        header, offset = {}, 0
        for name, shape in self._expected:
            end = offset + 4 * shape.numel()
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._num_bytes = self._crc32c = 0
        self._file = create_file(path)
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, float32 and on the CPU."""
        expected, shape = self._expected.pop(0)
        assert (name, tensor.shape, tensor.dtype) == (expected, shape, torch.float32), (name, expected)
        values = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, len(values), _CHUNK_BYTES):
            self._write(values[start : start + _CHUNK_BYTES].tobytes())

    def finish(self) -> FileRecord:
        """Forces the file to the disk, and returns what it holds."""
        assert not self._expected, f"{self._path}: {len(self._expected)} tensors were not added"
        with explained(f"writing {self._path.name}", folder=self._path.parent, num_bytes=self._num_bytes):
            sync_file(self._file)
            self._file.close()
        return FileRecord(num_bytes=self._num_bytes, crc32c=self._crc32c)

    def abandon(self) -> None:
        """Removes the file."""
        abandon_file(self._file, self._path)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._num_bytes += len(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
