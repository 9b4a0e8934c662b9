"""Removing samples: a fragment says at which generation they are gone; their bytes stay until they are swept."""

from collections.abc import Collection

import pyarrow as pa

from shared.cache.commit import commit_rows
from shared.cache.dataset import Cache, rows_of
from shared.cache.identity import shard_id
from shared.cache.schema import REMOVED, SAMPLE


def remove_samples(cache: Cache, samples: Collection[str]) -> int:
    """Removes samples of a cache and returns how many there were. Encoded again, they come back.

    Args:
        cache: Where they are.
        samples: Their identities; those that the cache does not hold are passed over.
    """
    chosen = set(samples)
    if not chosen:
        return 0
    rows = []
    for row in rows_of(cache.read_index(columns=[])):
        if row["sample"] in chosen:
            generations = [value["generation"] for value in row.values() if isinstance(value, dict)]
            rows.append({"sample": row["sample"], REMOVED.name: max(generations)})
    if not rows:
        return 0
    schema = pa.schema([*SAMPLE, REMOVED])
    members = [f"{row['sample']}@{row[REMOVED.name]}" for row in rows]
    commit_rows(
        cache.store,
        shard_id(members, streams=["removed"]),
        pa.Table.from_pylist(rows, schema=schema),
        {"kind": "removal"},
    )
    return len(rows)
