"""JSON lines: an object a line. Values that are not text are read as the same text in a CSV file would be."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.manifest.names import Roles
from shared.media.manifest.rows import BATCH_ROWS, Batch, Refusals

MAX_COLUMNS = 1000


def read_json_lines(path: Path, shown: str, roles: Roles, refusals: Refusals) -> Iterator[Batch]:
    """Yields the rows of a file of JSON objects. Empty lines are no rows; what an object leaves out is null.

    Args:
        path: The file.
        shown: What to call it in messages.
        roles: Which columns are read.
        refusals: Gets the rows with text that is none (half a surrogate pair).

    Raises:
        InputError: if a line is no UTF-8, no object, or names a key twice; if columns are missing or hold objects.
    """
    names: dict[str, None] = {}
    num_rows = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            objects = _objects(shown, file)
            while some := list(islice(objects, BATCH_ROWS)):
                for _, found in some:
                    names.update(dict.fromkeys(found))
                if len(names) > MAX_COLUMNS:
                    raise InputError(
                        f"manifest {shown}: more than {MAX_COLUMNS} columns: expected the same keys a line"
                    )
                numbers = np.arange(num_rows + 1, num_rows + len(some) + 1)
                num_rows += len(some)
                yield _batch(shown, some, numbers, [name for name in names if roles.is_read(name)], roles, refusals)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"manifest {shown}: not readable as UTF-8 JSON lines: {error}") from None
    roles.check(shown, list(names))


def parse_object(text: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: if it is none, or names a key twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def as_text(value: Any) -> str | None:
    """Returns a JSON value as text: as Python writes it, lists and objects as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def is_text(value: str | None) -> bool:
    """Returns whether a string has no half of a surrogate pair."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _objects(shown: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_object(line)
            except ValueError as error:
                raise InputError(f"manifest {shown}: line {number} is no JSON object: {error}") from None


def _batch(
    shown: str,
    some: list[tuple[int, dict[str, Any]]],
    numbers: np.ndarray,
    names: list[str],
    roles: Roles,
    refusals: Refusals,
) -> Batch:
    names = list(dict.fromkeys((roles.path, *roles.texts, *names)))
    columns: dict[str, list[str | None]] = {name: [] for name in names}
    kept = np.ones(len(some), bool)
    for row, (line, found) in enumerate(some):
        texts = {name: as_text(found.get(name)) for name in names}
        if not all(is_text(name) and is_text(text) for name, text in texts.items()):
            kept[row] = False
            shown_source = str(texts.get(roles.path) or f"row {numbers[row]}")
            refusals.add(shown_source, "bad_text", f"line {line}: half a surrogate pair")
            continue
        for name, text in texts.items():
            value = found.get(name)
            if isinstance(value, dict) or (isinstance(value, list) and roles.range not in found):
                raise InputError(
                    f"manifest {shown}: line {line}: {name!r} holds a {type(value).__name__}: expected text: write one "
                    "line a caption, or leave the key out"
                )
            columns[name].append(text)
    return Batch(
        numbers=numbers[kept], columns={name: pa.array(texts, pa.large_string()) for name, texts in columns.items()}
    )
