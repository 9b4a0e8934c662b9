"""Reading caches of format version 1, which had other columns for texts and no generations."""

from typing import Any

import pyarrow as pa

from shared.cache.layout import LATENT_STREAM
from shared.cache.schema import rows_table

Row = dict[str, Any]

_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}
_MICRO_BATCH = 16
_ABOUT = ("sample", "source", "source_version", "num_frames", "height", "width", "frame_interval", "fps")


def upgrade(table: pa.Table) -> pa.Table:
    """Returns a fragment of version 1 with the columns of version 2, its metadata kept.

    Version 1 packed a sample's captions into one payload with one checksum. Each becomes a payload of its own; where
    there are several, their checksums are not known.

    Raises:
        ValueError: if it is no such fragment.
    """
    rows = [_row(row) for row in table.to_pylist()]
    if not rows:
        raise ValueError("a fragment of version 1 without rows")
    return rows_table(rows).replace_schema_metadata(table.schema.metadata)


def upgrade_provenance(streams: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the streams of a ``dataset.json`` of version 1 as in version 2.

    Their ``codec`` is not known. Caches older than the key ``micro_batch`` were made with 16.
    """
    upgraded = {name: {"codec": None, **provenance} for name, provenance in streams.items()}
    if LATENT_STREAM in upgraded:
        upgraded[LATENT_STREAM].setdefault("micro_batch", _MICRO_BATCH)
    return upgraded


def _row(row: Row) -> Row:
    latent, text = row["latent"], row["text.t5"]
    captions = []
    offset = text["offset"]
    token_bytes = text["channels"] * _BYTES_PER_VALUE[text["codec"]]
    for identity, caption, num_tokens in zip(text["ids"], row["captions"], text["num_tokens"], strict=True):
        captions.append(
            {
                "id": identity,
                "caption": caption,
                "shard": text["shard"],
                "offset": offset,
                "bytes": num_tokens * token_bytes,
                "crc32c": text["crc32c"] if len(text["ids"]) == 1 else None,
                "codec": text["codec"],
                "num_tokens": num_tokens,
            }
        )
        offset += num_tokens * token_bytes
    return {
        **{name: row[name] for name in _ABOUT},
        "latent": {"generation": 0, **{name: value for name, value in latent.items() if name != "id"}},
        "text.t5": {"generation": 0, "channels": text["channels"], "captions": captions},
    }
