"""Durable files and folders on a file system: a name is given to something whole, in one step, or not at all.

Everything is written under a temporary name beside its final one, forced to the disk, and then renamed or linked; the
folder is forced to the disk too, or a loss of power could take the name back.
"""

import ctypes
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shared.stores.store import StoreError, StoreFullError

TEMPORARY_PREFIX = ".tmp-"
"""Names that start so are leftovers of a writer that died; no reader looks at them."""

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the limit on the size of files is reached (ulimit -f)",
}
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def temporary_path(folder: Path) -> Path:
    """Returns a fresh name inside ``folder`` for what is being written."""
    return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def store_error(error: OSError, *, doing: str, folder: Path, num_bytes: int | None = None) -> StoreError:
    """Returns what to tell the user of a failed operation on files.

    Args:
        doing: What was tried, such as ``writing index/ab.parquet``.
        folder: Where.
        num_bytes: How much was to be written, as far as known.
    """
    if num_bytes is not None:
        doing += f" ({num_bytes:,} bytes)"
    reason = _FULL.get(error.errno or 0)
    if reason is not None:
        return StoreFullError(
            f"{folder}: {reason} ({free_bytes(folder):,} bytes free) while {doing}; nothing half-written was kept: "
            "make room there or choose another place, then run again"
        )
    reason = (error.strerror or str(error)).lower()
    return StoreError(f"{folder}: {reason} while {doing}: check that this folder exists, is mounted and may be used")


def free_bytes(folder: Path) -> int:
    """Returns what is free on the disk of a folder, which need not be there yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def explained(doing: str, *, folder: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turns an OSError of the block into a :class:`StoreError`, see :func:`store_error`."""
    try:
        yield
    except OSError as error:
        raise store_error(error, doing=doing, folder=folder, num_bytes=num_bytes) from error


def sync_folder(folder: Path) -> None:
    """Forces a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates ``folder`` and what is missing above it, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


class _CheckedFile(io.FileIO):
    """A file whose failing writes say what is wrong."""

    def write(self, data: object) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            path = Path(os.fsdecode(self.name)) if not isinstance(self.name, int) else Path("/")
            raise store_error(
                error, doing=f"writing a new file behind {self.tell():,} bytes", folder=path.parent
            ) from error


def create_file(path: Path) -> BinaryIO:
    """Creates a file to write, seek and read in; a full disk shows as :class:`StoreFullError`.

    Raises:
        StoreError: It cannot be created.
    """
    with explained("creating a new file", folder=path.parent):
        make_folder(path.parent)
        return io.BufferedRandom(_CheckedFile(path, "x+b"))


def give_usual_mode(path: Path) -> None:
    """Lets whom a new file in its folder lets read this one, which a library wrote for its owner alone.

    The mode is that of a file made for the purpose: to read the umask would be to set it, for all threads. Where files
    have no modes that could be changed, as on some mounts, it stays as it is.
    """
    new = temporary_path(path.parent)
    with suppress(OSError):
        try:
            new.touch(exist_ok=False)
            path.chmod(new.stat().st_mode & 0o777)
        finally:
            new.unlink(missing_ok=True)


def sync_file(file: BinaryIO) -> None:
    """Forces what was written into ``file`` to the disk."""
    file.flush()
    os.fsync(file.fileno())


def abandon_file(file: BinaryIO, path: Path) -> None:
    """Removes a file that is being written; what is still buffered is dropped with it."""
    with suppress(OSError, StoreError):  # Closing tries to write what is buffered, which fails again on a full disk.
        file.close()
    path.unlink(missing_ok=True)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file for writing; on leaving, its bytes are on the disk. On an error the file is removed.

    Raises:
        StoreFullError: The disk is full.
        StoreError: The file cannot be written.
    """
    file = create_file(path)
    try:
        yield file
        with explained(f"writing {path.name}", folder=path.parent):
            sync_file(file)
            file.close()
    except BaseException:
        abandon_file(file, path)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Gives a durable file or folder its final name, in one step that survives a loss of power; replaces a file."""
    with explained(f"renaming {temporary.name} to {final.name}", folder=final.parent):
        make_folder(final.parent)
        os.rename(temporary, final)
        sync_folder(final.parent)


def publish_if_absent(temporary: Path, final: Path) -> bool:
    """Gives a durable file its final name unless something has that name; the temporary name is gone in either case.

    Returns:
        Whether ``final`` is this file.
    Raises:
        StoreError: Also where the file system has neither hard links nor a rename that replaces nothing.
    """
    with explained(f"claiming {final.name}", folder=final.parent):
        try:
            make_folder(final.parent)
            created = _link(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        if created:
            sync_folder(final.parent)
    return created


def _link(temporary: Path, final: Path) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        # Over NFS the answer to a successful link may get lost, and the client tries again.
        return temporary.samefile(final)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _rename_without_replacing(temporary, final)
    return True


def _rename_without_replacing(temporary: Path, final: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        old, new = os.fsencode(temporary), os.fsencode(final)
        if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EEXIST:
            return False
        if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(final))
    raise StoreError(
        f"{final.parent}: this file system has neither hard links nor renameat2(RENAME_NOREPLACE), so that no writer "
        "can be sure to be the only one: choose another file system (ext4, xfs, NFS, Lustre) or an object store"
    )
