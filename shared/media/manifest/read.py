"""Reads a manifest of any format."""

import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.manifest.checks import checked_rows
from shared.media.manifest.delimited import read_csv
from shared.media.manifest.folder import is_folder, read_folder
from shared.media.manifest.json_lines import read_json_lines
from shared.media.manifest.manifest import Manifest, TableRows, refused_row
from shared.media.manifest.merge import OTHER, SCHEMA, group_rows, merged
from shared.media.manifest.names import Roles
from shared.media.manifest.parquet import read_parquet
from shared.media.manifest.patterns import find_shards, root_of_pattern
from shared.media.manifest.ranges import expand_ranges
from shared.media.manifest.rows import Batch, Refusals, Spill
from shared.media.manifest.shards import read_shards
from shared.media.manifest.values import ColumnKind
from shared.media.refusal import MediaError
from shared.media.remote import remote
from shared.media.urls import locate, parent_of, scheme_of

_FILES = (".csv", ".parquet", ".jsonl")
_EXPECTED = "a .csv, .parquet or .jsonl with columns path and text, .tar shards, or a folder of clips"


def read_manifest(url: str | Path, *, columns: dict[str, str] | None = None, ignore: Collection[str] = ()) -> Manifest:
    """Reads a manifest: CSV, Parquet, JSON lines, WebDataset shards, or a folder of clips.

    Rows lie in files of the system's temporary folder while they are read, and the result in one that has no name any
    more: it goes when the manifest does, even if the process is killed.

    Args:
        url: Where it is, on this machine or at a URL; shards by a pattern such as ``shards/{000..099}.tar``.
        columns: What the manifest calls our columns: its name -> ``path``, ``text``, ``start``, ``end`` or ``range``.
        ignore: Further columns of the manifest to leave out.

    Raises:
        InputError: if it is missing, not readable, or has other columns than it should.
    """
    shown = str(url)
    if not shown:
        raise InputError(f"an empty path is no manifest: expected {_EXPECTED}")
    roles = Roles.of(columns or {}, ignore)
    refusals = Refusals()
    located = locate(shown)
    try:
        with tempfile.TemporaryDirectory(prefix="manifest-") as folder:
            root, batches = _open(located, shown, roles, refusals, Path(folder))
            return _read(batches, root, roles, refusals, Path(folder))
    except MediaError as error:
        raise InputError(f"manifest {shown}: {error}") from None


def _open(url: str, shown: str, roles: Roles, refusals: Refusals, folder: Path) -> tuple[str, Iterator[Batch]]:
    """Returns from where sources are relative, and the manifest's rows."""
    ending = Path(urlsplit(url).path if url.startswith("http") else url).suffix
    if ending == ".tar" and not os.path.isdir(url):
        root = root_of_pattern(url)
        return root, read_shards(find_shards(url, shown), shown, root, roles, refusals)
    if is_folder(url, known_file=ending in _FILES):
        return url.rstrip("/") or "/", read_folder(url, shown, roles, refusals)
    if scheme_of(url) is None and not os.path.isfile(url):
        raise InputError(f"manifest {shown}: no such file: expected {_EXPECTED}")
    if ending not in _FILES:
        raise InputError(f"manifest {shown}: ending {ending!r}: expected {_EXPECTED}")
    path = Path(url)
    if scheme_of(url) is not None:
        path = folder / f"manifest{ending}"
        with open(path, "wb") as file:
            remote(url).fetch(file)
    if ending == ".csv":
        return parent_of(url), read_csv(path, shown, roles)
    if ending == ".parquet":
        return parent_of(url), read_parquet(path, shown, roles)
    return parent_of(url), read_json_lines(path, shown, roles, refusals)


def _read(batches: Iterator[Batch], root: str, roles: Roles, refusals: Refusals, folder: Path) -> Manifest:
    spill = Spill(folder, "rows")
    kinds: dict[str, ColumnKind] = {}
    sources: list[pa.Array] = []
    starts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    num_rows = 0
    for batch in batches:
        num_rows = max(num_rows, int(batch.numbers[-1]) if len(batch.numbers) else 0)
        if roles.range in batch.columns:
            batch = expand_ranges(batch, roles, refusals)
        if not len(batch.numbers):
            continue
        ours, others = checked_rows(batch, roles, root, refusals)
        for name in others:  # Of all rows, so that refusing one never changes what a column is.
            kinds.setdefault(name, ColumnKind()).look_at(batch.columns[name])
        sources.append(ours["source"])
        starts.append(ours["start"].to_numpy(zero_copy_only=False))
        ends.append(ours["end"].to_numpy(zero_copy_only=False))
        spill.write({**ours, **{f"{OTHER}{name}": array for name, array in others.items()}})
    spill.close()
    groups = group_rows(sources, starts, ends)
    table = _written(merged(spill, groups, kinds), folder / "clips.arrow")
    return Manifest(root=root, num_rows=num_rows, table=table, refused=TableRows(refusals.table(), refused_row))


def _written(batches: Iterator[pa.RecordBatch], path: Path) -> pa.Table:
    """Returns the batches as a table in mapped memory."""
    first = next(batches, None)
    if first is None:
        return SCHEMA.empty_table()
    with pa.ipc.new_file(str(path), first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
