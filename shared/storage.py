"""Durable writes to a file system: an object is seen whole or not at all, and is never overwritten."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
"""Names that start so are leftovers of a writer that died; no reader looks at them."""


def temporary_path(folder: Path) -> Path:
    """Returns a fresh name inside ``folder`` for an object that is being written."""
    return folder / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Opens ``path`` for writing; on leaving, its bytes are on the disk. On an error the file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def publish(temporary: Path, final: Path) -> None:
    """Gives a durable temporary file its final name, in one step that survives a loss of power."""
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(temporary, final)
    _sync_folder(final.parent)


def write_if_absent(path: Path, data: bytes) -> bool:
    """Writes ``data`` under ``path`` unless something has that name already; of two writers exactly one succeeds.

    Returns:
        Whether this call created the object.
    """
    temporary = temporary_path(path.parent)
    with durable_file(temporary) as file:
        file.write(data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return True
