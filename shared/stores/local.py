"""A store on a file system."""

import builtins
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from shared.stores import files
from shared.stores.ranges import merge_ranges
from shared.stores.store import Entry, checked_path

NUM_OPEN_FILES = 64
"""Files that a store keeps open for reading ranges."""
READ_AHEAD_BYTES = 256 * 1024
"""Ranges no farther apart than this are left to the system, which reads on where reading was in order."""


class _Descriptor:
    """A file that is open for reading; closed when the last thread that reads from it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(
            self.number, 0, 0, os.POSIX_FADV_SEQUENTIAL
        )  # Reads ahead farther; scattered reads lose nothing.

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """The files that were read last, kept open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[Path, _Descriptor] = OrderedDict()

    def get(self, path: Path) -> _Descriptor:
        with self._lock:
            descriptor = self._descriptors.get(path)
            if descriptor is None:
                descriptor = self._descriptors[path] = _Descriptor(path)
                if len(self._descriptors) > NUM_OPEN_FILES:
                    self._descriptors.popitem(last=False)
            else:
                self._descriptors.move_to_end(path)
            return descriptor

    def forget(self, path: Path) -> None:
        with self._lock:
            self._descriptors.pop(path, None)


class LocalNewFile:
    """A temporary file in the store's root, see ``shared.stores.store.NewFile``."""

    def __init__(self, store: "LocalStore", temporary: Path, file: BinaryIO) -> None:
        self._store, self._temporary, self._file = store, temporary, file

    @property
    def file(self) -> BinaryIO:
        return self._file

    def publish(self, path: str) -> None:
        assert not self._file.closed, "published already"
        final = self._store.local_path(path)
        root = self._temporary.parent
        with files.explained(f"writing {path}", folder=root, num_bytes=self._file.seek(0, os.SEEK_END)):
            files.sync_file(self._file)
            self._file.close()
        files.publish(self._temporary, final)
        self._store.forget(path)


class LocalStore:
    """A folder, see ``shared.stores.store.Store``. It need not exist before something is written.

    Args:
        root: The folder; a relative one counts from the current folder of now.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))
        self._open_files, self._process = _OpenFiles(), os.getpid()

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[Path]]:
        return LocalStore, (self._root,)

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    def __str__(self) -> str:
        return self.url

    @property
    def url(self) -> str:
        return str(self._root)

    def local_path(self, path: str) -> Path:
        return self._root / checked_path(path)

    def read(self, path: str) -> bytes:
        with self._reading(path):
            return self.local_path(path).read_bytes()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        return self.read_ranges(path, [(offset, length)])[0]

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        with self._reading(path):
            descriptor = self._files().get(self.local_path(path))
            spans = merge_ranges(ranges, READ_AHEAD_BYTES).spans
            if len(spans) > 1:  # The disk reads all of them while the first ones are taken.
                for start, end in spans:
                    os.posix_fadvise(descriptor.number, start, end - start, os.POSIX_FADV_WILLNEED)
            return [_read_fully(descriptor.number, offset, length) for offset, length in ranges]

    def size(self, path: str) -> int | None:
        try:
            with self._reading(path):
                status = self.local_path(path).stat()
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return (entry for entry in self._walk(prefix) if not _is_temporary(entry.path))

    def leftovers(self) -> Iterator[Entry]:
        return (entry for entry in self._walk("") if _is_temporary(entry.path))

    def write(self, path: str, data: bytes) -> None:
        final = self.local_path(path)
        temporary = self._write_temporary(path, data)
        try:
            files.publish(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        self.forget(path)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        final = self.local_path(path)
        if final.exists():
            return False  # Spares the work, not more: only the link decides.
        return files.publish_if_absent(self._write_temporary(path, data), final)

    @contextmanager
    def new_file(self) -> Iterator[LocalNewFile]:
        temporary = files.temporary_path(self._root)
        file = files.create_file(temporary)
        try:
            yield LocalNewFile(self, temporary, file)
        finally:
            files.abandon_file(file, temporary)

    def delete(self, path: str) -> None:
        with files.explained(f"deleting {path}", folder=self._root):
            self.local_path(path).unlink(missing_ok=True)
        self.forget(path)

    def forget(self, path: str) -> None:
        """Drops what is kept open of an object whose name was given to other bytes or to none."""
        self._files().forget(self.local_path(path))

    def _files(self) -> _OpenFiles:
        if self._process != os.getpid():  # Forked: another thread of the parent may have held the lock.
            self._open_files, self._process = _OpenFiles(), os.getpid()
        return self._open_files

    def _write_temporary(self, path: str, data: bytes) -> Path:
        temporary = files.temporary_path(self._root)
        with (
            files.explained(f"writing {path}", folder=self._root, num_bytes=len(data)),
            files.durable_file(temporary) as file,
        ):
            file.write(data)
        return temporary

    def _walk(self, prefix: str) -> Iterator[Entry]:
        start = self.local_path(prefix) if prefix else self._root
        entries: builtins.list[Entry] = []
        folders = [start]
        with files.explained(f"listing {prefix or 'everything'}", folder=self._root):
            while folders:
                folder = folders.pop()
                try:
                    found = builtins.list(os.scandir(folder))
                except (FileNotFoundError, NotADirectoryError):
                    continue
                for item in found:
                    if item.is_dir():
                        folders.append(Path(item.path))
                        continue
                    try:
                        status = item.stat()
                    except FileNotFoundError:
                        continue
                    entries.append(
                        Entry(
                            path=Path(item.path).relative_to(self._root).as_posix(),
                            num_bytes=status.st_size,
                            modified=datetime.fromtimestamp(status.st_mtime, UTC),
                        )
                    )
        return iter(sorted(entries, key=lambda entry: entry.path))

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"{self._root}: no object {path}") from None
        except OSError as error:
            raise files.store_error(error, doing=f"reading {path}", folder=self._root) from error


def _read_fully(descriptor: int, offset: int, length: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    while data and len(data) < length:  # One call gives at most 2 GiB, and less when a signal comes.
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _is_temporary(path: str) -> bool:
    return any(part.startswith(files.TEMPORARY_PREFIX) for part in path.split("/"))
