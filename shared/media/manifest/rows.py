"""A manifest's rows on their way: batches of Arrow columns, and a file on disk that keeps them meanwhile."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

BATCH_ROWS = 65_536
_REFUSED = pa.schema([(name, pa.string()) for name in ("source", "reason", "detail")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where members of tars lie."""

    urls: pa.Array  # large_string
    offsets: pa.Array  # int64
    sizes: pa.Array  # int64


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """The parts of clips that are meant, in seconds; null: from the beginning, or to the end."""

    starts: pa.Array  # float64
    ends: pa.Array  # float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows."""

    numbers: np.ndarray
    """Their numbers in the manifest, from 1 on."""
    columns: dict[str, pa.Array]
    """By the manifest's names; text where the format has no types."""
    places: Places | None = None
    """If the manifest itself says where the bytes lie."""
    times: Times | None = None
    """If they are known apart from the columns."""


class Spill:
    """Record batches in Arrow files; a new file begins whenever there is a new column."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._paths: list[Path] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._schema = pa.schema([])

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Adds rows: columns of one length. A column's type never changes."""
        if missing := [name for name in columns if self._schema.get_field_index(name) < 0]:
            self._begin(pa.schema([*self._schema, *(pa.field(name, columns[name].type) for name in missing)]))
        assert self._writer is not None
        num_rows = len(next(iter(columns.values())))
        arrays = [
            columns[field.name] if field.name in columns else pa.nulls(num_rows, field.type) for field in self._schema
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def _begin(self, schema: pa.Schema) -> None:
        self.close()
        self._schema = schema
        self._paths.append(self._folder / f"{self._name}-{len(self._paths)}.arrow")
        self._writer = pa.ipc.new_file(str(self._paths[-1]), schema)

    def close(self) -> None:
        """Ends writing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def schema(self) -> pa.Schema:
        """All columns."""
        return self._schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields what was written, in order, each batch in memory of its own and with all columns."""
        for path in self._paths:
            with pa.OSFile(str(path)) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    yield self._completed(reader.get_batch(number))

    def mapped(self) -> list[pa.RecordBatch]:
        """Returns what was written, in order, in mapped memory."""
        readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in self._paths]
        return [reader.get_batch(number) for reader in readers for number in range(reader.num_record_batches)]

    def _completed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for name in self._schema.names[batch.num_columns :]:
            field_ = self._schema.field(name)
            batch = batch.append_column(field_, pa.nulls(len(batch), field_.type))
        return batch


class Refusals:
    """Rows that name no clip or say nothing of it, as they are found."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, source: str, reason: str, detail: str) -> None:
        """Adds a row; a name that is no text is shown as Python shows it."""
        self._rows.append((_shown(source), reason, _shown(detail)))
        if len(self._rows) >= BATCH_ROWS:
            self._pack()

    def table(self) -> pa.Table:
        """Returns all of them: source, reason, detail."""
        self._pack()
        return pa.Table.from_batches(self._batches, schema=_REFUSED)

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        arrays = [pa.array(column, pa.string()) for column in columns]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=_REFUSED))
        self._rows.clear()


def _shown(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return repr(text)
    return text
