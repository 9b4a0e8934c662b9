"""The ledger of refused clips: nothing is dropped without a reason that can be read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from shared.cache import layout
from shared.cache.fragments import fragment_bytes
from shared.cache.identity import ledger_id
from shared.cache.schema import LEDGER
from shared.stores.store import Store


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


def write_ledger(store: Store, refusals: Sequence[Refusal]) -> None:
    """Adds refused clips to the cache's ledger. The same refusals are written once."""
    if refusals:
        rows = [asdict(refusal) for refusal in refusals]
        table = pa.Table.from_pylist(rows, schema=LEDGER)
        store.write_if_absent(
            f"{layout.LEDGER_FOLDER}/{ledger_id(rows)}.parquet", fragment_bytes(table, {"kind": "ledger"})
        )
