"""Manifests: which clips there are and what is said of them. CSV, Parquet, JSON lines, WebDataset shards, folders.

``path`` and ``text`` are required of files. What a manifest says of a clip's size and length is not believed (manifests
lie): those columns are known, read over, and probing finds the truth. Rows of one path, start and end are one clip with
several captions. Other columns are those of its first row.

Everything stays in Arrow's columns and files, so that ten million rows take a minute and little memory.
"""

from shared.media.manifest.manifest import Manifest, RefusedRow, TableRows, clip_of_row
from shared.media.manifest.names import OURS, PROBED_COLUMNS, REQUIRED_COLUMNS, check_mapping, parse_mapping
from shared.media.manifest.read import read_manifest

__all__ = [
    "OURS",
    "PROBED_COLUMNS",
    "REQUIRED_COLUMNS",
    "Manifest",
    "RefusedRow",
    "TableRows",
    "check_mapping",
    "clip_of_row",
    "parse_mapping",
    "read_manifest",
]
