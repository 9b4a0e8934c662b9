"""What reading needs of the index, as arrays that all ranks and workers of a node share.

The rows that a run trains on are put into storage order (by bucket, shard, offset; where clips have several variants,
see ``train.variants``) and written once a node as ``.npy`` files, which every process maps into its memory: they lie in
the page cache once, strings are left out, and shards and codecs are numbers. A folder is named by a hash of all that it
was made from, so it is never out of date.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import InputError

Array = npt.NDArray[Any]

LAYOUT_VERSION = 3
IMAGE_FPS = 120.0
"""What stands for the rate of an image, as STDiT3 was trained with (Open-Sora 1.2's ``IMG_FPS``)."""
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
    """The rows in order. The captions of row i are ``caption_start[i] .. caption_start[i + 1]``."""

    identity: Array
    """(N, 2) uint64: the samples' identities."""
    fps: Array
    """(N,) float32: frames a second of the frames that were taken; of images ``IMAGE_FPS``."""
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
            fps=load("fps"),
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


def build_once(folder: Path, made_from: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> IndexFolder:
    """Returns the index made from ``made_from``; the first process of the node to ask builds it, others wait.

    Args:
        folder: See :func:`node_folder`.
        made_from: JSON: all that decides what ``build`` returns.
        build: Writes the columns into a folder, returns their description.
    """
    key = hashlib.sha256(json.dumps([LAYOUT_VERSION, made_from], sort_keys=True).encode()).hexdigest()[:32]
    final = folder / key
    if not final.is_dir():
        with open(folder / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                _make(folder, final, build)
    return IndexFolder(path=final)


def _make(folder: Path, final: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    temporary = folder / f".tmp-{os.getpid()}-{secrets.token_hex(6)}"
    try:
        with keeping(folder):
            temporary.mkdir()
        about = json.dumps(build(temporary))
        with keeping(folder):
            (temporary / _ABOUT_FILE).write_text(about)
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into an :class:`InputError` that names the folder of the index."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder}: cannot keep the index there ({error}): name another folder: --local-cache"
        ) from None


def save_column(folder: Path, name: str, values: Array) -> None:
    """Writes a column, named as in :class:`IndexColumns`, with the stream's name before that of a payload's.

    Raises:
        InputError: if it cannot be written.
    """
    with keeping(folder):
        np.save(folder / f"{name}.npy", values)


class Spool:
    """Columns that grow, in files of a folder: in memory are only those that are taken. Use it in ``with``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._columns: dict[str, tuple[BufferedRandom, np.dtype[Any]]] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def append(self, name: str, values: Array) -> None:
        """Adds values to a column's end; the same type each time.

        Raises:
            InputError: if they cannot be written.
        """
        with keeping(self._folder):
            if name not in self._columns:
                file = self._files.enter_context(open(self._folder / f"{name}.spool", "w+b"))  # noqa: SIM115
                self._columns[name] = file, values.dtype
            file, kind = self._columns[name]
            assert values.dtype == kind
            file.write(np.ascontiguousarray(values).data)

    def take(self, name: str) -> Array:
        """Returns a column's values, one behind another, and removes its file."""
        with keeping(self._folder):
            file, kind = self._columns.pop(name)
            with file:
                file.seek(0)
                values = np.fromfile(file, kind)
            (self._folder / f"{name}.spool").unlink()
        return values
