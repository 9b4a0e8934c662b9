"""Parquet: columns stay as they are typed until all of them were seen."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import InputError
from shared.media.manifest.names import Roles
from shared.media.manifest.rows import BATCH_ROWS, Batch


def read_parquet(path: Path, shown: str, roles: Roles) -> Iterator[Batch]:
    """Yields the rows of a Parquet file.

    Args:
        path: The file.
        shown: What to call it in messages.
        roles: Which columns are read.

    Raises:
        InputError: if it is no Parquet file, columns are missing, or one holds lists or bytes.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            roles.check(shown, names)
            wanted = [name for name in names if roles.is_read(name)]
            for name in wanted:
                _check_type(shown, name, file.schema_arrow.field(name).type, has_ranges=roles.range in names)
            num_rows = 0
            # A dot in a name asks for a part of a column: all are read then.
            asked = None if any("." in name for name in names) else wanted
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=asked):
                columns = {name: _decoded(batch.column(name)) for name in wanted}
                yield Batch(numbers=np.arange(num_rows + 1, num_rows + len(batch) + 1), columns=columns)
                num_rows += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"manifest {shown}: not readable as Parquet: {error}") from None


def _check_type(shown: str, name: str, kind: pa.DataType, *, has_ranges: bool) -> None:
    if has_ranges and (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return
    if pa.types.is_nested(kind) or _is_binary(kind):
        raise InputError(
            f"manifest {shown}: column {name!r} is of type {kind}: expected text: write one row a caption, or "
            "leave the column out"
        )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _decoded(array: pa.Array) -> pa.Array:
    """Returns text as large_string, whatever the file has it in, and seen to be UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array.validate(full=True)
        return array.cast(pa.large_string())
    return array
