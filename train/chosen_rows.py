"""Which of a cache's samples a run takes: a condition, a part that is held out. Evaluated a row group at a time."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shared.cache.dataset import Cache
from shared.cache.live import LiveRows, read_by_groups
from shared.cache.schema import ABOUT, MANIFEST, WINDOW, concat_rows
from shared.cache.winners import Rows
from shared.errors import InputError
from train.where import Where, held_out, parse_fraction


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which rows of the index are used."""

    where: str | None = None
    """A condition, see :class:`train.where.Where`."""
    holdout: str | None = None
    """The part of the sources that is held out, e.g. ``1%``."""
    held_out_side: bool = False
    """Take what is held out, not the rest."""


def choose_rows(cache: Cache, live: LiveRows, selection: Selection) -> Rows:
    """Returns the positions of the live samples that a selection takes, ascending; at least one.

    Raises:
        InputError: if there is none, or the selection is not one that the cache's columns allow.
    """
    if not len(live):
        raise InputError(f"{cache.url}: the cache holds no sample: run preprocess into it first")
    where = Where(selection.where) if selection.where else None
    fraction = parse_fraction(selection.holdout) if selection.holdout else None
    if where is None and fraction is None:
        return np.arange(len(live))
    columns = ["sample", *(where.paths if where else []), *(["source"] if fraction is not None else [])]
    known = _all_columns(live.schema)
    empty = _selected(live.schema, columns).empty_table()
    fulfils, taken = np.ones(len(live), bool), np.ones(len(live), bool)
    for rows, ((part, places),) in read_by_groups(cache.store, live, [live.latent], list(dict.fromkeys(columns))):
        # Each column with the type that it has over all files, as if they had been read into one table.
        table = concat_rows([empty, rows.select(_present(rows, empty)).take(pa.array(places))])
        if where:
            fulfils[part] = where.select(table, lambda: known).to_numpy(zero_copy_only=False)
        if fraction is not None:
            taken[part] = held_out(table["source"], fraction) == selection.held_out_side
    if not fulfils.any():
        raise InputError(f"{cache.url}: no sample fulfils --where {selection.where!r}: ask for less")
    chosen = np.flatnonzero(fulfils & taken)
    if not len(chosen):
        side = "held out" if selection.held_out_side else "left to train on"
        raise InputError(f"{cache.url}: --holdout {selection.holdout}: no sample is {side}: take another part")
    return chosen


def _manifest_names(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema.field(MANIFEST).type] if MANIFEST in schema.names else []


def _all_columns(schema: pa.Schema) -> list[str]:
    windows = [name for name in WINDOW.names if name in schema.names]
    return ["sample", *ABOUT.names, *windows, *_manifest_names(schema)]


def _present(table: pa.Table, wanted: pa.Table) -> list[str]:
    return [name for name in wanted.column_names if name in table.column_names]


def _selected(schema: pa.Schema, paths: list[str]) -> pa.Schema:
    """Returns the schema of some columns; of the manifest, of the fields asked for."""
    fields = [schema.field(name) for name in schema.names if name in paths]
    own = [schema.field(MANIFEST).type.field(name) for name in _manifest_names(schema) if f"{MANIFEST}.{name}" in paths]
    return pa.schema([*fields, pa.field(MANIFEST, pa.struct(own))] if own else fields)
