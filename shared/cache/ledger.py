"""The ledger of refused clips: nothing is dropped without a reason that can be read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.fragments import fragment_bytes
from shared.cache.identity import ledger_id
from shared.cache.schema import LEDGER
from shared.errors import InputError
from shared.redaction import without_credentials
from shared.stores.store import Store

_SHOWN = ("reason", "source", "detail")


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


def ledger_lines(ledger: pa.Table, reason: str | None = None, *, as_json: bool = False) -> list[str]:
    """Returns the ledger as text: a line a refusal, in the order of reasons and sources.

    Args:
        ledger: See ``Cache.read_ledger``.
        reason: Only refusals for this one.
        as_json: Lines of JSON without what does not apply, with sources as the manifest has them; else reason, source
            and detail with tabs between them, without credentials.

    Raises:
        InputError: if the ledger has others, and none for this reason.
    """
    if reason is not None and ledger.num_rows:
        found = pc.unique(ledger["reason"]).to_pylist()
        if reason not in found:
            raise InputError(
                f"--reason {reason}: nothing is refused for it: expected one of {', '.join(sorted(found))}"
            )
        ledger = ledger.filter(pc.equal(ledger["reason"], reason))
    rows = ledger.sort_by([(name, "ascending") for name in _SHOWN]).to_pylist()
    if as_json:
        made = ({name: value for name, value in row.items() if value is not None} for row in rows)
        return [json.dumps(row, ensure_ascii=False) for row in made]
    return ["\t".join(" ".join(without_credentials(row[name]).split()) for name in _SHOWN) for row in rows]
