"""Parts of clips: times as seconds or H:MM:SS, and rows with a list of ranges made one row a range. Pure."""

import ast
import json
import math
import re
from typing import Any

import numpy as np
import pyarrow as pa

from shared.media.manifest.names import Roles
from shared.media.manifest.rows import Batch, Places, Refusals, Times

_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2}(?:\.\d*)?)", re.ASCII)
_SECONDS = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_LIST_CHARACTERS = 10_000_000
Plain = str | float | bool | None


def parse_seconds(value: Any) -> float | None:
    """Returns a time in seconds, from a number, ``12.5``, ``2:07.5`` or ``0:02:07.500``; None for nothing.

    Raises:
        ValueError: if it is no time.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        text = value.strip()
        if clock := _CLOCK.fullmatch(text):
            hours, minutes, seconds = int(clock[1] or 0), int(clock[2]), float(clock[3])
            if seconds >= 60 or (clock[1] and minutes >= 60):
                raise ValueError(f"{value!r} is no time: expected H:MM:SS")
            return 3600.0 * hours + 60.0 * minutes + seconds
        if not _SECONDS.fullmatch(text):
            raise ValueError(f"{value!r} is no time: expected seconds or H:MM:SS")
        return float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no time: expected seconds or H:MM:SS")
    return float(value)


def check_range(start: float | None, end: float | None) -> tuple[float | None, float | None]:
    """Returns a range as it is kept: (None, None) for the whole clip, else with a start.

    Raises:
        ValueError: if it is empty, or has a bound that is negative or no finite number.
    """
    begin = 0.0 if start is None else start
    if not (math.isfinite(begin) and begin >= 0) or (end is not None and not (math.isfinite(end) and end > begin)):
        raise ValueError(f"range {begin:g} .. {'' if end is None else f'{end:g}'}: expected 0 <= start < end")
    return (None, None) if begin == 0 and end is None else (begin + 0.0, end)


def parse_list(value: Any) -> list[Any] | None:
    """Returns a list that stands as a list or as a text (JSON or Python's notation), or None for anything else."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("[") or len(value) > _MAX_LIST_CHARACTERS:
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def _pairs(value: Any) -> list[Any]:
    """Returns the ranges that a value of a range column names: pairs, unless they are wrong.

    Raises:
        ValueError: if it is no list.
    """
    found = parse_list(value)
    if found is not None and len(found) == 2 and not any(isinstance(part, list | tuple) for part in found):
        found = [found]
    if not found:
        raise ValueError(f"{_short(value)}: expected [start, end] or a list of such pairs")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def expand_ranges(batch: Batch, roles: Roles, refusals: Refusals) -> Batch:
    """Returns one row for each range of each row.

    Captions that are a list are zipped with the ranges, one each; other columns as well, where they are a list of as
    many plain values. A range that is none is refused by itself; a row that has no list of ranges, or another number of
    captions, is refused whole.
    """
    values = batch.columns[roles.range].to_pylist()
    names = [name for name in batch.columns if name != roles.range]
    columns = {name: batch.columns[name].to_pylist() for name in names}
    chosen: list[int] = []
    starts: list[float | None] = []
    ends: list[float | None] = []
    taken: dict[str, list[Any]] = {name: [] for name in names}
    for row, value in enumerate(values):
        number = batch.numbers[row]
        source = str(columns[roles.path][row] or f"row {number}")
        try:
            pairs = _ranges(value)
            zipped = {name: _zipped(name, columns[name][row], len(pairs), roles) for name in names}
        except ValueError as error:
            refusals.add(source, "bad_range", f"row {number}: {error}")
            continue
        for place, pair in enumerate(pairs):
            try:
                start, end = _range(pair)
            except ValueError as error:
                refusals.add(source, "bad_range", f"row {number}, range {place + 1} of {len(pairs)}: {error}")
                continue
            chosen.append(row)
            starts.append(start)
            ends.append(end)
            for name, many in zipped.items():
                taken[name].append(many[place])
    places = batch.places and Places(
        urls=batch.places.urls.take(chosen),
        offsets=batch.places.offsets.take(chosen),
        sizes=batch.places.sizes.take(chosen),
    )
    return Batch(
        numbers=batch.numbers[np.array(chosen, np.int64)],
        columns={name: _array(many, batch.columns[name].type) for name, many in taken.items()},
        places=places,
        times=Times(starts=pa.array(starts, pa.float64()), ends=pa.array(ends, pa.float64())),
    )


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Returns plain values as they were typed, or as texts where they come out of lists."""
    if not pa.types.is_nested(kind):
        return pa.array(
            [value if value is None or not pa.types.is_large_string(kind) else str(value) for value in values], kind
        )
    return pa.array([None if value is None else str(value) for value in values], pa.large_string())


def _ranges(value: Any) -> list[Any]:
    """Returns the ranges of a row as it gives them; nothing stands for the whole clip."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return [(None, None)]
    return _pairs(value)


def _range(pair: Any) -> tuple[float | None, float | None]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(f"{_short(pair)}: expected [start, end]")
    start, end = pair
    return check_range(parse_seconds(start), parse_seconds(end))


def _zipped(name: str, value: Any, count: int, roles: Roles) -> list[Any]:
    found = None if name == roles.path else parse_list(value)
    if name in roles.texts:
        if found is None:
            return [value] * count
        if len(found) != count:
            raise ValueError(f"{count} ranges and {len(found)} of {name}: expected one for each")
        return [text if isinstance(text, str) else None for text in found]
    if found is None or len(found) != count or not all(isinstance(part, Plain) for part in found):
        return [value] * count
    return found
