"""CSV: strict, UTF-8, with a header."""

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.manifest.names import Roles
from shared.media.manifest.rows import BATCH_ROWS, Batch

_MAX_FIELD_BYTES = 16 * 1024 * 1024


def read_csv(path: Path, shown: str, roles: Roles) -> Iterator[Batch]:
    """Yields the rows of a CSV file. Lines without anything are no rows.

    Args:
        path: The file.
        shown: What to call it in messages.
        roles: Which columns are read.

    Raises:
        InputError: if it is no UTF-8 CSV, a row has another number of fields than the header, or columns are missing.
    """
    limit = csv.field_size_limit(_MAX_FIELD_BYTES)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            roles.check(shown, names)
            wanted = [(place, name) for place, name in enumerate(names) if roles.is_read(name)]
            rows = _checked(shown, reader, len(names))
            num_rows = 0
            while some := list(islice(rows, BATCH_ROWS)):
                fields = list(zip(*some, strict=True))
                columns = {name: pa.array(fields[place], pa.large_string()) for place, name in wanted}
                yield Batch(numbers=np.arange(num_rows + 1, num_rows + len(some) + 1), columns=columns)
                num_rows += len(some)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"manifest {shown}: not readable as UTF-8 CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _checked(shown: str, reader: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    for number, row in enumerate(reader, start=1):
        if not row:
            continue
        if len(row) != width:
            raise InputError(
                f"manifest {shown}: row {number} has {len(row)} fields: expected {width}: quote its commas"
            )
        yield row
