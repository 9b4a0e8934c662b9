"""Shards as files: kept open, read into memory that is used again."""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from shared.errors import InputError
from train.index_columns import Array

_MAX_OPEN = 64
_MAX_FREE_BUFFERS = 256
_MIB = 1 << 20


class ShardFiles:
    """Reads stretches of files. For several threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()
        self._free: list[Array] = []

    def buffer(self, num_bytes: int) -> Array:
        """Returns memory (uint8) for at least ``num_bytes``; fresh memory costs more than filling it."""
        with self._lock:
            fitting = [number for number, free in enumerate(self._free) if len(free) >= num_bytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
        return np.empty(-(-num_bytes // _MIB) * _MIB, np.uint8)

    def give_back(self, buffer: Array) -> None:
        """Takes memory back that :meth:`buffer` gave."""
        with self._lock:
            self._free.append(buffer)
            if len(self._free) > _MAX_FREE_BUFFERS:
                del self._free[0]

    def read(self, path: Path, offset: int, into: Array) -> Array | None:
        """Fills ``into`` from a file and returns it, cut where the file ends; None if there is no file.

        Raises:
            InputError: if the file cannot be read.
        """
        filled = 0
        try:
            descriptor = self._descriptor(path)
            while filled < len(into):
                count = os.preadv(descriptor.number, [memoryview(into)[filled:]], offset + filled)
                if not count:
                    break
                filled += count
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{path}, offset {offset}: not readable ({error})") from None
        return into[:filled]

    def _descriptor(self, path: Path) -> "_Descriptor":
        with self._lock:
            if path not in self._open:
                self._open[path] = _Descriptor(path)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path]


class _Descriptor:
    """An open file, closed when the last thread that reads from it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
