"""An opened cache: provenance, the committed index and the ledger. Shards are written in ``commit.py``.

What has no index fragment does not exist: readers start from the index and never list the shards.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.cache import layout, version1
from shared.cache.fragments import IndexFiles, find_files, read_rows, read_table, shared_text_tables
from shared.cache.resolve import resolve
from shared.cache.schema import FORMAT_VERSION, LEDGER
from shared.cache.shared_texts import PLACE_COLUMNS, SharedTexts
from shared.errors import InputError
from shared.stores.open import open_store
from shared.stores.store import Store

Provenance = dict[str, dict[str, Any]]
"""By stream: what made it. See ``docs/cache_format.md`` for the keys."""

_FORMAT_NAME = "latentmill-cache"
_READERS = 16
_ROWS_AT_ONCE = 1 << 14
_INFORMATIVE = {"model"}
"""Provenance that may differ: where the weights were found matters less than their hash, which is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedShard:
    """What a commit left behind."""

    shard: str
    """Below the cache's root; empty where nothing was written."""
    num_samples: int
    num_bytes: int
    created: bool
    """False where another writer had committed the same shard before."""


class Cache:
    """An opened cache. Build it with :meth:`open` or :meth:`open_or_create`."""

    def __init__(self, store: Store, provenance: Provenance, version: int) -> None:
        self.store, self.provenance, self.version = store, provenance, version

    @property
    def url(self) -> str:
        """The cache's folder or URL."""
        return self.store.url

    @classmethod
    def open(cls, url: str | Path) -> "Cache":
        """Opens an existing cache.

        Raises:
            InputError: if there is none, or it has a format version that this code does not read.
        """
        store = open_store(url)
        place = f"{store.url}/{layout.DATASET_FILE}"
        try:
            text = store.read(layout.DATASET_FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{store.url}: found no {layout.DATASET_FILE}: expected the folder or URL of a cache made by preprocess"
            ) from None
        try:
            content = json.loads(text)
            version, provenance = content["version"], content["streams"]
            if content["format"] != _FORMAT_NAME:
                raise KeyError(content["format"])
            _check_provenance(provenance)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{place}: not the description of a cache ({error}): expected one made by preprocess"
            ) from None
        if version == 1:
            return cls(store, version1.upgrade_provenance(provenance), version)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{place}: format version {version}: this code reads 1 and {FORMAT_VERSION}: update it or the cache"
            )
        return cls(store, {**_added_streams(store), **provenance}, version)

    @classmethod
    def open_or_create(cls, url: str | Path, provenance: Provenance) -> "Cache":
        """Opens the cache, or makes an empty one of this provenance. A stream of texts that it lacks is added.

        Raises:
            InputError: if the folder holds something else, or a cache of another provenance, naming all that
                differs.
        """
        store = open_store(url)
        check_is_cache_or_empty(store)
        check_has_clips(store, provenance)
        description = {"format": _FORMAT_NAME, "version": FORMAT_VERSION, "streams": provenance}
        _write_json(store, layout.DATASET_FILE, description)
        cache = cls.open(url)
        if cache.version != FORMAT_VERSION:
            raise InputError(
                f"{store.url}: its format version {cache.version} is read and not extended: bring it to version "
                f"{FORMAT_VERSION} by python -m shared.cache convert"
            )
        for stream in provenance.keys() - cache.provenance.keys():
            if layout.is_text(stream):
                _write_json(store, f"{layout.STREAM_FOLDER}/{stream}.json", provenance[stream])
                cache = cls.open(url)
        cache.require(provenance)
        return cache

    def require(self, provenance: Provenance) -> None:
        """Raises :class:`InputError` where this cache was made with other models or settings, naming all of them."""
        for stream in provenance:
            if stream not in self.provenance:
                raise InputError(f"{self.url}: found no stream {stream!r}: it has {', '.join(self.provenance)}")
        keys = {stream: ours.keys() | self.provenance[stream].keys() for stream, ours in provenance.items()}
        self._compare(provenance, keys)

    def require_settings(self, known: Provenance) -> None:
        """Likewise, of provenance of which only some is known; streams that this cache lacks do not count."""
        self._compare(known, {stream: ours.keys() for stream, ours in known.items() if stream in self.provenance})

    def _compare(self, provenance: Provenance, keys: Mapping[str, Set[str]]) -> None:
        told = []
        for stream, compared in keys.items():
            ours = provenance[stream]
            theirs = self.provenance[stream]
            differing = sorted(key for key in compared - _INFORMATIVE if ours.get(key) != theirs.get(key))
            if differing:
                told.append(
                    f"its stream {stream!r} was made with {_shown(theirs, differing)}, this job has "
                    f"{_shown(ours, differing)}"
                )
        if told:
            raise InputError(f"{self.url}: {'; '.join(told)}: use the cache's own settings or another --output")

    def index_files(self) -> IndexFiles:
        """Returns the fragments and the snapshot that count."""
        return find_files(self.store)

    def read_index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns the committed samples, one row each, each stream as it was encoded last.

        Rows stand as in the fragments: those of one shard together, in the shard's order.

        Args:
            columns: Parquet paths such as ``fps`` or ``latent.offset``; all by default. Of a nested column only the
                fields asked for are read.

        Raises:
            InputError: if a fragment cannot be read.
        """
        return resolve(self._rows(columns))

    def shared_texts(self, text_stream: str) -> SharedTexts:
        """Returns where the texts lie that samples share, by the texts' identities; with ``channels``."""
        tables = shared_text_tables(self.store, self.index_files().paths(), PLACE_COLUMNS)
        return SharedTexts(tables, f"{layout.SHARD_FOLDER}/{text_stream}/")

    def read_ledger(self) -> pa.Table:
        """Returns the refused clips, one row each, without duplicates."""
        paths = [entry.path for entry in self.store.list(layout.LEDGER_FOLDER) if entry.path.endswith(".parquet")]
        with ThreadPoolExecutor(_READERS) as pool:
            tables = list(pool.map(lambda path: read_table(self.store, path), paths))
        table = pa.concat_tables([LEDGER.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])
        return table.group_by(LEDGER.names).aggregate([]).select(LEDGER.names)

    def _rows(self, columns: Sequence[str] | None) -> pa.Table:
        if columns is not None:
            streams = [layout.LATENT_STREAM, *(name for name in self.provenance if layout.is_text(name))]
            columns = ["sample", "removed", *(f"{stream}.generation" for stream in streams), *columns]
        return read_rows(self.store, self.index_files().paths(), columns)


def _shown(made: dict[str, Any], keys: Sequence[str]) -> str:
    return f"{', '.join(f'{key}={made.get(key)!r}' for key in keys)} (model {made.get('model')})"


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yields a table's rows; some at a time become Python objects."""
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _added_streams(store: Store) -> Provenance:
    """Returns the provenance of the streams that were added after the cache was made."""
    added = {}
    for entry in store.list(layout.STREAM_FOLDER):
        name = entry.path.removeprefix(f"{layout.STREAM_FOLDER}/").removesuffix(".json")
        try:
            added[name] = json.loads(store.read(entry.path))
            _check_provenance(added)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise InputError(
                f"{store.url}/{entry.path}: not the description of a stream ({error}): bring it back"
            ) from None
    return added


def _check_provenance(streams: object) -> None:
    """Raises TypeError unless this is a description of streams, each with its width."""
    if not isinstance(streams, dict) or not all(isinstance(values, dict) for values in streams.values()):
        raise TypeError("expected an object with the streams, each an object")
    for stream, values in streams.items():
        name = "latent_channels" if stream == layout.LATENT_STREAM else "text_channels"
        if type(values.get(name)) is not int or values[name] < 1:
            raise TypeError(f"stream {stream}: {name} is {values.get(name)}, expected a whole number of at least 1")


def check_has_clips(store: Store, streams: Collection[str]) -> None:
    """Raises :class:`InputError` if streams of texts alone are to be added, and there is no cache."""
    if layout.LATENT_STREAM not in streams and store.size(layout.DATASET_FILE) is None:
        raise InputError(
            f"{store.url}: found no cache to add {', '.join(streams)} to: encode clips into it first, or name the "
            "cache that was meant"
        )


def check_is_cache_or_empty(store: Store) -> None:
    """Raises :class:`InputError` if a new cache cannot be made in the store and none is there."""
    folder = store.local_path(layout.DATASET_FILE)
    if folder is not None and folder.parent.exists() and not folder.parent.is_dir():
        raise InputError(f"{store.url}: found a file: expected a folder for the cache")
    if store.size(layout.DATASET_FILE) is not None:
        return
    probes = f"{layout.PROBE_FOLDER}/"
    foreign = next((entry for entry in store.list() if not entry.path.startswith(probes)), None)
    if foreign is not None and store.size(layout.DATASET_FILE) is None:  # else another job made it meanwhile
        raise InputError(f"{store.url}: found {foreign.path!r} but no {layout.DATASET_FILE}: expected an empty folder")


def _write_json(store: Store, path: str, value: Any) -> None:
    """Writes a document that never changes, unless it is there."""
    store.write_if_absent(path, (json.dumps(value, indent=2) + "\n").encode())
