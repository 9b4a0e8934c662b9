"""Manifests: which clips there are and what is said of them. CSV and Parquet in Open-Sora's columns.

``path`` and ``text`` are required. What a manifest says of a clip's size and length is not believed (manifests lie):
those columns are known, read over, and probing finds the truth. Rows of one path are one clip with several captions.
Other columns are those of its first row: numbers where all of a column's values are numbers, truth values where all are
true or false, and text else.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import InputError

REQUIRED_COLUMNS = ("path", "text")
_TRUTH = {"True": True, "true": True, "False": False, "false": False}
PROBED_COLUMNS = ("num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
"""Open-Sora's further columns: known, and found out anew by probing."""


Value = float | bool | str | None
"""Of a column that is neither path nor text."""

_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)?(?(1)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|NaN|inf|Infinity)")
"""What is a number in a column of numbers; 007 and 1_000 are names."""
_EXACT = 2**53
"""Above, a double does not tell an integer from its neighbour."""

_MAX_CHARACTERS = 5_000
"""Of a caption: far more than any token limit keeps, and little enough to be cleaned in a moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A clip of the manifest."""

    source: str
    """Its path as the manifest gives it."""
    path: Path
    """Where it lies: relative sources are taken from the manifest's folder."""
    captions: tuple[str, ...]
    columns: Mapping[str, Value] = field(default_factory=dict)
    """What else the manifest says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedRow:
    """A row that names no clip or says nothing of it."""

    source: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a manifest holds, in its order."""

    num_rows: int
    clips: tuple[Clip, ...]
    refused: tuple[RefusedRow, ...]


def read_manifest(path: Path, *, columns: dict[str, str] | None = None, ignore: Sequence[str] = ()) -> Manifest:
    """Reads a CSV or Parquet manifest.

    Args:
        path: The file, ``.csv`` or ``.parquet``.
        columns: What the manifest calls our columns: its name -> ``path`` or ``text``.
        ignore: Further columns of the manifest to leave out.

    Raises:
        InputError: if the file is missing, not readable, or has other columns than it should.
    """
    if not path.is_file():
        raise InputError(f"manifest {path}: no such file: expected a .csv or .parquet with columns path and text")
    mapping = {ours: theirs for theirs, ours in (columns or {}).items()}
    if set(mapping) - set(REQUIRED_COLUMNS):
        raise InputError(f"columns {columns}: expected NAME=path or NAME=text")
    names, rows = _read_rows(path, {*ignore, *PROBED_COLUMNS})
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"manifest {path}: two columns are called {doubled[0]!r}: name each column once")
    for column in (*mapping.values(), *ignore):
        if column not in names:
            raise InputError(f"manifest {path}: no column {column!r}: found {', '.join(names)}")
    wanted = [mapping.get(column, column) for column in REQUIRED_COLUMNS]
    for ours, theirs in zip(REQUIRED_COLUMNS, wanted, strict=True):
        if theirs not in names:
            raise InputError(
                f"manifest {path}: no column {ours!r}: found {', '.join(names)}: name it by --columns NAME={ours}"
            )
    others = [name for name in names if name not in {*wanted, *PROBED_COLUMNS, *ignore}]
    values = {name: _values([row[names.index(name)] for row in rows]) for name in others}
    pairs = [(row[names.index(wanted[0])], row[names.index(wanted[1])]) for row in rows]
    return _merge(path, pairs, values)


def _values(texts: list[str | None]) -> list[Value]:
    """Returns a column's texts as numbers or truth values where all of them are such."""
    present = [text for text in texts if text]
    if present and all(text in _TRUTH for text in present):
        return [_TRUTH.get(text or "") for text in texts]
    if not all(_NUMBER.fullmatch(text) for text in present):
        return list(texts)
    numbers = {text: float(text) for text in present}
    finite = [number for number in numbers.values() if math.isfinite(number)]
    if not finite or max(map(abs, finite)) > _EXACT:
        return list(texts)
    return [numbers[text] if text and math.isfinite(numbers[text]) else None for text in texts]


def _merge(manifest: Path, rows: list[tuple[str | None, str | None]], values: Mapping[str, list[Value]]) -> Manifest:
    captions: dict[str, dict[str, None]] = {}
    first_rows: dict[str, int] = {}
    refused = []
    for number, (source, text) in enumerate(rows, start=1):
        if not source or not source.strip():
            refused.append(RefusedRow(source=f"row {number}", reason="no_path", detail="the row names no clip"))
        elif not text or not text.strip():
            refused.append(RefusedRow(source=source, reason="no_caption", detail=f"row {number} has no text"))
        elif len(text) > _MAX_CHARACTERS:
            detail = f"row {number}: {len(text)} characters: expected at most {_MAX_CHARACTERS}"
            refused.append(RefusedRow(source=source, reason="caption_too_long", detail=detail))
        elif "\x00" in source:
            refused.append(
                RefusedRow(source=repr(source), reason="bad_path", detail=f"row {number}: the path has a NUL byte")
            )
        else:
            captions.setdefault(source, {})[text] = None
            first_rows.setdefault(source, number - 1)
    clips = tuple(
        Clip(
            source=source,
            path=manifest.parent / source,
            captions=tuple(texts),
            columns={name: column[first_rows[source]] for name, column in values.items()},
        )
        for source, texts in captions.items()
    )
    return Manifest(num_rows=len(rows), clips=clips, refused=tuple(refused))


def _read_rows(path: Path, unread: Collection[str]) -> tuple[list[str], list[Sequence[str | None]]]:
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
            columns = [
                [None] * len(table) if name in unread else _texts(path, name, table[name])
                for name in table.column_names
            ]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"manifest {path}: not readable as Parquet: {error}") from None
        return table.column_names, list(zip(*columns, strict=True))
    raise InputError(f"manifest {path}: ending {path.suffix!r}: expected .csv or .parquet")


def _texts(path: Path, name: str, column: pa.ChunkedArray) -> list[str | None]:
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise InputError(
            f"manifest {path}: column {name!r} is of type {column.type}: expected text: write one row a caption, or "
            "leave the column out"
        )
    return [None if value is None else str(value) for value in column.to_pylist()]


def _read_csv(path: Path) -> tuple[list[str], list[Sequence[str | None]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            rows: list[Sequence[str | None]] = list(_checked(path, reader, len(names)))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"manifest {path}: not readable as UTF-8 CSV: {error}") from None
    return names, rows


def _checked(path: Path, reader: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    for number, row in enumerate(reader, start=1):
        if not row:
            continue
        if len(row) != width:
            raise InputError(f"manifest {path}: row {number} has {len(row)} fields: expected {width}: quote its commas")
        yield row
