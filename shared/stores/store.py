"""What a cache needs of the place where it stands, and what can go wrong there.

A store is a flat set of objects under one root, named by relative POSIX paths such as ``index/ab.parquet``. Two rules
make it safe for several writers: an object is seen whole or not at all, and :meth:`Store.write_if_absent` lets exactly
one of several writers have a name. A rename is not among the operations, since object stores have none.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from shared.errors import InputError


class StoreError(InputError):
    """Raised where a store refuses or cannot be reached, and trying again at once would not help."""


class StoreBusyError(StoreError):
    """A store that did not answer, or asked for patience, for as long as it was tried: it may answer later."""


class StoreFullError(StoreError):
    """Raised where an object does not fit: a full disk, a quota, a limit on the size of files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One object in a listing."""

    path: str
    """Relative to the store's root."""
    num_bytes: int
    modified: datetime
    """With its time zone."""


class NewFile(Protocol):
    """A large object that is being written; nobody sees it before :meth:`publish`."""

    @property
    def file(self) -> BinaryIO:
        """An empty local file, to write, read and seek in. A full disk shows as :class:`StoreFullError`."""
        ...

    def publish(self, path: str) -> None:
        """Makes the file's bytes durable under ``path``; an object of that name is replaced. Call it once at most."""
        ...


class Store(Protocol):
    """A root folder on a disk or under a bucket. Safe with threads; picklable: each process opens it anew."""

    @property
    def url(self) -> str:
        """The root, as users know it; also what ``str`` gives."""
        ...

    def read(self, path: str) -> bytes:
        """Returns a whole object.

        Raises:
            FileNotFoundError: There is no such object. So with every way to read.
            StoreError: The store cannot be read. So with every method.
        """
        ...

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Returns ``length`` bytes from ``offset``; fewer where the object ends, none behind its end."""
        ...

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Returns what :meth:`read_range` gives for each (offset, length), read together: the faster way for many."""
        ...

    def size(self, path: str) -> int | None:
        """Returns an object's bytes, or None if there is no such object."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Gives every object below the folder ``prefix``, sorted by path; "" is the root. Leftovers are not among them.

        An object that is deleted meanwhile may be given or not.
        """
        ...

    def leftovers(self) -> Iterator[Entry]:
        """Gives the temporary files of writers that are at work or died, sorted by path.

        :meth:`delete` takes their names. An object store has none to show: there, a lifecycle rule of the bucket
        removes unfinished multipart uploads.
        """
        ...

    def write(self, path: str, data: bytes) -> None:
        """Writes an object, whole or not at all; it is durable on return. An object of that name is replaced.

        Raises:
            StoreFullError: There is no room; nothing was kept.
        """
        ...

    def write_if_absent(self, path: str, data: bytes) -> bool:
        """Writes an object unless something has that name already; of several writers exactly one succeeds.

        On an object store the answer to a successful write may get lost. The next attempt then finds an object there,
        which is taken for ours if its bytes are ``data``. So a claim must hold something that no other writer's has,
        such as a random token; where it does not matter who wrote it, equal bytes may give True to several.

        Returns:
            Whether this call created the object.
        Raises:
            StoreFullError: There is no room; nothing was kept.
        """
        ...

    def new_file(self) -> AbstractContextManager[NewFile]:
        """Opens a large object for writing; leaving the block without :meth:`NewFile.publish` drops it."""
        ...

    def delete(self, path: str) -> None:
        """Removes an object; it may be gone already."""
        ...

    def local_path(self, path: str) -> Path | None:
        """Returns where the object's file is or would be, or None if the store keeps no files on this machine."""
        ...


def checked_path(path: str) -> str:
    """Returns ``path`` if it names something below the root.

    Raises:
        ValueError: It is absolute or empty, or has an empty part, ``.``, ``..``, a backslash or a control character.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or not path.isprintable():
        raise ValueError(f"{path!r} is no relative path inside a store: parts are separated by single slashes")
    return path
