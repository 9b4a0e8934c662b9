"""The columns of the index and of the ledger.

A stream is one struct column of the index, named after the stream. A fragment has the columns that its rows need; what
it lacks is null where fragments are read together.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.cache.layout import is_text

FORMAT_VERSION = 2

_PLACE = [
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("bytes", pa.int64()),
    ("crc32c", pa.int64()),
    ("codec", pa.string()),
]

SAMPLE = pa.schema([("sample", pa.string())])
"""The identity of a row's sample: the one column that every fragment has."""

ABOUT = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frame_interval", pa.int32()),
        ("fps", pa.float64()),
    ]
)
"""Where a sample comes from and its bucket; in rows that bring a latent."""

WINDOW = pa.schema(
    [
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("sampling_fps", pa.float64()),
        ("window", pa.int32()),
        ("flip", pa.bool_()),
    ]
)
"""Which part of its source a sample is: the time range in seconds, at how many frames a second it was taken by time,
where its window starts (in frames, or in steps of ``1 / sampling_fps`` seconds), whether it is mirrored. In rows that
bring a latent, where they apply; none of them for the middle of a whole clip whose frames were taken by number."""

REMOVED = pa.field("removed", pa.int32())
"""The generation at which a sample was removed; in rows of removals."""

MANIFEST = "manifest"
"""A struct of the manifest's other columns; in rows that bring a latent, where the manifest has such columns."""

LATENT = pa.struct(
    [
        ("generation", pa.int32()),
        *_PLACE,
        ("shape", pa.list_(pa.int32())),
        ("mean", pa.list_(pa.float32())),
        ("std", pa.list_(pa.float32())),
    ]
)

CAPTION = pa.struct([("id", pa.string()), ("caption", pa.string()), *_PLACE, ("num_tokens", pa.int32())])
"""One caption's embedding: its identity, its text as the manifest gives it, its place."""

TEXT = pa.struct([("generation", pa.int32()), ("channels", pa.int32()), ("captions", pa.list_(CAPTION))])

SHARED = "text"
SHARED_TEXT = pa.schema([(SHARED, CAPTION), ("channels", pa.int32())])
"""The columns of a fragment of texts that samples share: no samples, one row a caption."""

LEDGER = pa.schema(
    [
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("bucket", pa.string()),
        ("sample", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""One row a refused clip or manifest row. ``bucket`` and ``sample`` are null where no bucket was reached."""


def stream_type(stream: str) -> pa.StructType:
    """Returns the type of a stream's column."""
    return TEXT if is_text(stream) else LATENT


def concat_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """Returns rows of the index one behind another, with the columns of all; what a table lacks is null.

    A column of the manifest may hold numbers in one job and text in another: it is text then.

    Args:
        tables: At least one.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        kinds: dict[str, set[str]] = defaultdict(set)
        for table in tables:
            for field in _manifest_fields(table.schema):
                kinds[field.name].add(_kind(field.type))
        mixed = {name for name, found in kinds.items() if len(found - {"null"}) > 1}
        return pa.concat_tables([_with_texts(table, mixed) for table in tables], promote_options="permissive")


def _manifest_fields(schema: pa.Schema) -> list[pa.Field]:
    return list(schema.field(MANIFEST).type) if MANIFEST in schema.names else []


def _kind(kind: pa.DataType) -> str:
    return "number" if pa.types.is_floating(kind) or pa.types.is_integer(kind) else str(kind)


def _with_texts(table: pa.Table, names: set[str]) -> pa.Table:
    """Returns rows whose manifest columns of these names are text."""
    fields = _manifest_fields(table.schema)
    if not names & {field.name for field in fields}:
        return table
    wanted = [field.with_type(pa.string()) if field.name in names else field for field in fields]
    chunks = [
        pa.StructArray.from_arrays(
            [pc.struct_field(chunk, old.name).cast(new.type) for old, new in zip(fields, wanted, strict=True)],
            fields=wanted,
            mask=chunk.is_null(),
        )
        for chunk in table[MANIFEST].chunks
    ]
    column = pa.chunked_array(chunks, pa.struct(wanted))
    return table.set_column(table.column_names.index(MANIFEST), MANIFEST, column)


def rows_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Returns rows of the index as a table with the columns that they have; what a row lacks is null.

    Args:
        rows: At least one. The values of ``manifest`` are plain: numbers, strings, booleans, None and lists of them.
    """
    if SHARED in rows[0]:
        return pa.Table.from_pylist(rows, schema=SHARED_TEXT)
    known = pa.unify_schemas([SAMPLE, ABOUT, WINDOW])
    fields = []
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in known.names:
            fields.append(known.field(name))
        elif name == REMOVED.name:
            fields.append(REMOVED)
        elif name == MANIFEST:
            fields.append(pa.field(name, pa.array([row.get(name) for row in rows]).type))
        else:
            fields.append(pa.field(name, stream_type(name)))
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def parquet_bytes(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Returns a Parquet file of one table, with ``metadata`` beside its schema."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata or None), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
