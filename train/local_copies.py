"""What was read from an object store, kept on a disk of the node for the epochs to come.

Each read is a file of its own, written under a temporary name and renamed. Nothing is thrown out to make room: an epoch
reads everything once, in a fresh order, and then the most recent is the least useful; what found room stays. Copies
are checked like anything else that is read, by the payloads' checksums, so they need not survive a loss of power.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import InputError
from train.index_columns import Array

_USED_FILE = "used_bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCopies:
    """Copies of one store's stretches. Shared by all processes of a node that name the same folder; cheap to pickle."""

    folder: Path
    limit_bytes: int
    """Of all copies in the folder, of whichever store."""
    url: str
    """The store's."""

    def open(self) -> None:
        """Makes the folder and counts what is there. Call it once, before any process uses the copies.

        Raises:
            InputError: if the folder cannot be used.
        """
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            total = sum(path.stat().st_size for path in self._root.rglob("*.part"))
            with self._counted() as count:
                count(total)
        except OSError as error:
            raise InputError(f"--local-cache {self.folder}: cannot keep copies there ({error})") from None

    def read(self, shard: str, offset: int, num_bytes: int) -> Array | None:
        """Returns a stretch, if it was kept."""
        try:
            data = np.fromfile(self._path(shard, offset, num_bytes), np.uint8)
        except FileNotFoundError:
            return None
        if len(data) == num_bytes:
            return data
        self.drop(shard, offset, num_bytes)
        return None

    def keep(self, shard: str, offset: int, data: Array) -> None:
        """Keeps a stretch, if there is room for it.

        Raises:
            InputError: if it cannot be written.
        """
        path = self._path(shard, offset, len(data))
        with self._counted() as count:
            used = count(None)
            if used + len(data) > self.limit_bytes or path.exists():
                return
            count(used + len(data))
        temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(6)}")
        try:
            data.tofile(temporary)
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(
                f"--local-cache {self.folder}: cannot write there ({error}): make room or lower --local-cache-gb"
            ) from None

    def drop(self, shard: str, offset: int, num_bytes: int) -> None:
        """Removes a stretch, if it was kept."""
        path = self._path(shard, offset, num_bytes)
        with self._counted() as count, contextlib.suppress(FileNotFoundError):
            length = path.stat().st_size
            path.unlink()
            count(max(0, count(None) - length))

    @property
    def _root(self) -> Path:
        return self.folder / "copies"

    @property
    def _files(self) -> Path:
        return self._root / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def _path(self, shard: str, offset: int, num_bytes: int) -> Path:
        name = hashlib.sha256(shard.encode()).hexdigest()[:32]
        return self._files / f"{name}-{offset}-{num_bytes}.part"

    @contextlib.contextmanager
    def _counted(self) -> Iterator["_Count"]:
        """Holds the folder's count of bytes; calling it with None reads it, with a number sets it."""
        descriptor = os.open(self._root / _USED_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Count(descriptor)
        finally:
            os.close(descriptor)


class _Count:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, value: int | None) -> int:
        if value is None:
            return int(os.pread(self._descriptor, 32, 0) or b"0")
        os.pwrite(self._descriptor, f"{value:032d}".encode(), 0)
        return value
