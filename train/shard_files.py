"""Shards as files that are kept open."""

import contextlib
import os
import threading
from collections import OrderedDict
from pathlib import Path

from shared.errors import InputError
from train.index_columns import Array

_MAX_OPEN = 64


class ShardFiles:
    """Reads stretches of files. For several threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def read_ahead(self, path: Path, offset: int, num_bytes: int) -> None:
        """Has the kernel read a stretch of a file into its cache; a file that cannot be read is left for later."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor(path).number, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, path: Path, offset: int, into: Array) -> Array | None:
        """Fills ``into`` from a file and returns it, cut where the file ends; None if there is no file.

        Raises:
            InputError: if the file cannot be read.
        """
        filled = 0
        try:
            descriptor = self._descriptor(path)
            while filled < len(into):
                count = os.preadv(descriptor.number, [into[filled:].data], offset + filled)
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
