"""The columns of the index and of the ledger.

A stream is one struct column of the index, named after the stream.
"""

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1

_PLACE = [
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("bytes", pa.int64()),
    ("crc32c", pa.int64()),
    ("codec", pa.string()),
]

INDEX = pa.schema(
    [
        ("sample", pa.string()),
        ("source", pa.string()),
        ("source_version", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frame_interval", pa.int32()),
        ("fps", pa.float64()),
        (
            "latent",
            pa.struct(
                [
                    ("id", pa.string()),
                    *_PLACE,
                    ("shape", pa.list_(pa.int32())),
                    ("mean", pa.list_(pa.float32())),
                    ("std", pa.list_(pa.float32())),
                ]
            ),
        ),
        (
            "text.t5",
            pa.struct(
                [
                    ("ids", pa.list_(pa.string())),
                    *_PLACE,
                    ("num_tokens", pa.list_(pa.int32())),
                    ("channels", pa.int32()),
                ]
            ),
        ),
    ]
)
"""One row a sample. Offsets and lengths are in bytes inside ``shard``, a path below the cache's folder."""

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


def parquet_bytes(table: pa.Table, metadata: dict[str, str]) -> bytes:
    """Returns a Parquet file of one table, with ``metadata`` beside its schema."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata or None), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
