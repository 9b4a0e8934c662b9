"""The columns of the index and of the ledger.

A stream is one struct column of the index, named after the stream. A fragment has the columns that its rows need; what
it lacks is null where fragments are read together.
"""

from typing import Any

import pyarrow as pa
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


def rows_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Returns rows of the index as a table with the columns that they have; all rows have the same ones.

    Args:
        rows: At least one. The values of ``manifest`` are plain: numbers, strings, booleans, None and lists of them.
    """
    if SHARED in rows[0]:
        return pa.Table.from_pylist(rows, schema=SHARED_TEXT)
    names = rows[0].keys()
    fields = []
    for name in names:
        if name in ABOUT.names or name == "sample":
            fields.append(pa.field(name, pa.unify_schemas([SAMPLE, ABOUT]).field(name).type))
        elif name == REMOVED.name:
            fields.append(REMOVED)
        elif name == MANIFEST:
            fields.append(pa.field(name, pa.array([row[name] for row in rows]).type))
        else:
            fields.append(pa.field(name, stream_type(name)))
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def parquet_bytes(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Returns a Parquet file of one table, with ``metadata`` beside its schema."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata or None), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
