"""A cache on disk: opening, provenance, the committed index and the ledger. Shards are written in ``commit.py``.

What has no index fragment does not exist: readers start from the fragments and never list the shards.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache import layout
from shared.cache.schema import FORMAT_VERSION, INDEX, LEDGER
from shared.errors import InputError
from shared.storage import TEMPORARY_PREFIX, write_if_absent

Provenance = dict[str, dict[str, Any]]
"""By stream: what made it. See ``docs/cache_format.md`` for the keys."""

_FORMAT_NAME = "latentmill-cache"
_INFORMATIVE = {"model"}
"""Provenance that may differ: where the weights were found matters less than their hash, which is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedShard:
    """What a commit left behind."""

    shard: str
    num_samples: int
    num_bytes: int
    created: bool
    """False where another writer had committed the same shard before."""


class Cache:
    """An opened cache. Build it with :meth:`open` or :meth:`open_or_create`."""

    def __init__(self, root: Path, provenance: Provenance) -> None:
        self.root = root
        self.provenance = provenance

    @classmethod
    def open(cls, root: str | Path) -> "Cache":
        """Opens an existing cache.

        Raises:
            InputError: if there is none, or it has a format version that this code does not read.
        """
        root = Path(root)
        file = root / layout.DATASET_FILE
        if not file.is_file():
            found = "no such folder" if not root.exists() else "a folder" if root.is_dir() else "a file"
            raise InputError(
                f"{root}: found {found} without {layout.DATASET_FILE}: expected a cache made by preprocess"
            )
        try:
            content = json.loads(file.read_text())
            version, provenance = content["version"], content["streams"]
            if content["format"] != _FORMAT_NAME:
                raise KeyError(content["format"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}: not the description of a cache ({error}): expected one made by preprocess"
            ) from None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{file}: format version {version}: this code reads {FORMAT_VERSION}: update it or the cache"
            )
        return cls(root, provenance)

    @classmethod
    def open_or_create(cls, root: str | Path, provenance: Provenance) -> "Cache":
        """Opens the cache, or makes an empty one of this provenance.

        Raises:
            InputError: if the folder holds something else, or a cache of another provenance (both values are named).
        """
        root = Path(root)
        check_is_cache_or_empty(root)
        root.mkdir(parents=True, exist_ok=True)
        description = {"format": _FORMAT_NAME, "version": FORMAT_VERSION, "streams": provenance}
        write_if_absent(root / layout.DATASET_FILE, (json.dumps(description, indent=2) + "\n").encode())
        cache = cls.open(root)
        cache.require(provenance)
        return cache

    def require(self, provenance: Provenance) -> None:
        """Raises :class:`InputError` where this cache was made with other models or settings than ``provenance``."""
        for stream, ours in provenance.items():
            if stream not in self.provenance:
                raise InputError(f"{self.root}: found no stream {stream!r}: expected it in {layout.DATASET_FILE}")
            theirs = self.provenance[stream]
            for key in sorted((ours.keys() | theirs.keys()) - _INFORMATIVE):
                if ours.get(key) != theirs.get(key):
                    raise InputError(
                        f"{self.root}: its stream {stream!r} was made with {key}={theirs.get(key)!r}"
                        f" (model {theirs.get('model')}), this job has {key}={ours.get(key)!r}"
                        f" (model {ours.get('model')}): use the cache's own settings or another --output"
                    )

    def fragments(self) -> list[Path]:
        """Returns the committed index fragments, by name."""
        return _parquet_files(self.root / layout.INDEX_FOLDER)

    def read_index(self) -> pa.Table:
        """Returns the committed samples, one row each, sorted by sample. Of two rows of one sample the first by
        fragment name counts.

        Raises:
            InputError: if a fragment cannot be read or has other columns.
        """
        table = _read_tables(self.fragments(), INDEX)
        _, first = np.unique(table["sample"].to_numpy(zero_copy_only=False).astype(str), return_index=True)
        return table.take(pa.array(first))

    def committed_samples(self) -> dict[str, tuple[str, ...]]:
        """Returns the captions of each committed sample, by the sample's identity."""
        samples: dict[str, tuple[str, ...]] = {}
        for fragment in self.fragments():
            table = _read_table(fragment, INDEX, columns=["sample", "captions"])
            for sample, captions in zip(*(column.to_pylist() for column in table.columns), strict=True):
                samples.setdefault(sample, tuple(captions))
        return samples

    def read_ledger(self) -> pa.Table:
        """Returns the refused clips, one row each, without duplicates."""
        table = _read_tables(_parquet_files(self.root / layout.LEDGER_FOLDER), LEDGER)
        return table.group_by(LEDGER.names).aggregate([]).select(LEDGER.names)


def check_is_cache_or_empty(root: Path) -> None:
    """Raises :class:`InputError` if a new cache cannot be made under ``root`` and none is there."""
    if root.exists() and not root.is_dir():
        raise InputError(f"{root}: found a file: expected a folder for the cache")
    if not root.is_dir() or (root / layout.DATASET_FILE).exists():
        return
    foreign = [entry.name for entry in root.iterdir() if not entry.name.startswith(TEMPORARY_PREFIX)]
    if foreign:
        raise InputError(f"{root}: found {sorted(foreign)[0]!r} but no {layout.DATASET_FILE}: expected an empty folder")


def _parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".parquet" and path.name[0] != ".")


def _read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({error}): run preprocess.verify") from None
    expected = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    if not table.schema.equals(expected):
        raise InputError(
            f"{path}: found columns {table.schema.names}: expected {expected.names} as in format version 1"
        )
    return table


def _read_tables(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    tables = [_read_table(path, schema) for path in paths]
    return pa.concat_tables([schema.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])
