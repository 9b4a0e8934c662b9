"""What reading needs of the index, as arrays that all ranks and workers of a node share.

The rows that a run trains on are put into storage order (by bucket, shard, offset) and written once a node as ``.npy``
files, which every process maps into its memory: they lie in the page cache once, strings are left out, and shards and
codecs are numbers. A folder is named by a hash of all that it was made from, so it is never out of date.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import InputError

Array = npt.NDArray[Any]

LAYOUT_VERSION = 1
_ABOUT_FILE = "about.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Payloads:
    """Where payloads lie, one a row."""

    shard: Array
    """int32, into the list of shards."""
    offset: Array
    """int64, in bytes from the start of the shard."""
    num_bytes: Array
    """int64."""
    crc32c: Array
    """int64; negative where it is not known."""
    codec: Array
    """uint8, into the list of codecs."""

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, rows: Array) -> "Payloads":
        """Returns some of the rows, in that order."""
        return Payloads(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexColumns:
    """The rows in storage order. The captions of row i are ``caption_start[i] .. caption_start[i + 1]``."""

    identity: Array
    """(N, 2) uint64: the samples' identities."""
    latent: Payloads
    caption_start: Array
    """(N + 1,) int64."""
    caption: Payloads
    num_tokens: Array
    """uint16, of each caption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFolder:
    """Columns in a folder of the node, with a small description. Cheap to pickle."""

    path: Path

    def about(self) -> dict[str, Any]:
        """Returns the description."""
        description: dict[str, Any] = json.loads((self.path / _ABOUT_FILE).read_text())
        return description

    def columns(self) -> IndexColumns:
        """Returns the columns, mapped into memory."""

        def load(name: str) -> Array:
            return np.load(self.path / f"{name}.npy", mmap_mode="r")

        def payloads(stream: str) -> Payloads:
            return Payloads(**{field.name: load(f"{stream}_{field.name}") for field in fields(Payloads)})

        return IndexColumns(
            identity=load("identity"),
            latent=payloads("latent"),
            caption_start=load("caption_start"),
            caption=payloads("caption"),
            num_tokens=load("num_tokens"),
        )


def node_folder(local_cache: Path | None) -> Path:
    """Returns the folder of this node where indices are kept: in ``local_cache``, or the system's temporary one.

    Raises:
        InputError: if it cannot be made, or belongs to somebody else.
    """
    user = os.getuid()
    folder = (local_cache or Path(tempfile.gettempdir()) / f"latentmill-{user}") / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / f".probe-{secrets.token_hex(4)}").mkdir()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot keep the index there ({error}): name another folder: --local-cache"
        ) from None
    for probe in folder.glob(".probe-*"):
        shutil.rmtree(probe, ignore_errors=True)
    if folder.parent.stat().st_uid != user and local_cache is None:
        raise InputError(f"{folder.parent}: belongs to another user: name a folder of your own: --local-cache")
    return folder


def build_once(
    folder: Path, made_from: Mapping[str, Any], build: Callable[[], tuple[IndexColumns, dict[str, Any]]]
) -> IndexFolder:
    """Returns the index made from ``made_from``; the first process of the node to ask builds it, others wait.

    Args:
        folder: See :func:`node_folder`.
        made_from: JSON: all that decides what ``build`` returns.
        build: Returns the columns and their description.
    """
    key = hashlib.sha256(json.dumps([LAYOUT_VERSION, made_from], sort_keys=True).encode()).hexdigest()[:32]
    final = folder / key
    if not final.is_dir():
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                _write(folder, final, *build())
    return IndexFolder(path=final)


def _write(folder: Path, final: Path, columns: IndexColumns, about: dict[str, Any]) -> None:
    temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
    temporary.mkdir()
    try:
        for field in fields(columns):
            value = getattr(columns, field.name)
            if isinstance(value, Payloads):
                for part in fields(value):
                    np.save(temporary / f"{field.name}_{part.name}.npy", getattr(value, part.name))
            else:
                np.save(temporary / f"{field.name}.npy", value)
        (temporary / _ABOUT_FILE).write_text(json.dumps(about))
        temporary.rename(final)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot keep the index there ({error}): name another folder: --local-cache"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
