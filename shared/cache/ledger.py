"""The ledger of refused clips: nothing is dropped without a reason that can be read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from shared.cache import layout
from shared.cache.identity import ledger_id
from shared.cache.schema import LEDGER, parquet_bytes
from shared.storage import write_if_absent


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a clip, or a row of the manifest, is not in the cache."""

    source: str
    source_version: str | None = None
    bucket: str | None = None
    sample: str | None = None
    reason: str
    """A short name to group by, e.g. ``not_a_video``."""
    detail: str
    """What was found, what was expected."""


def write_ledger(root: Path, refusals: Sequence[Refusal]) -> None:
    """Adds refused clips to the ledger of the cache under ``root``. The same refusals are written once."""
    if refusals:
        rows = [asdict(refusal) for refusal in refusals]
        path = root / layout.LEDGER_FOLDER / f"{ledger_id(rows)}.parquet"
        write_if_absent(path, parquet_bytes(pa.Table.from_pylist(rows, schema=LEDGER), {}))
