"""Which clips samples come from, for messages: looked up when something is to be said of them."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from shared.cache.dataset import Cache
from shared.cache.fragments import read_fragment
from train.online.index import OnlineIndex
from train.sample_index import IndexedSamples, SampleIndex


def sources_of(index: IndexedSamples, samples: Sequence[str]) -> dict[str, str]:
    """Returns the sources of samples by identity; reads a cache's index until all are found."""
    if isinstance(index, OnlineIndex):
        return index.sources(samples)
    assert isinstance(index, SampleIndex)
    return _in_cache(index.cache, samples)


def _in_cache(cache: Cache, samples: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    wanted = pa.array(list(samples), pa.string())
    for path in cache.index_files().paths():
        table = read_fragment(cache.store, path, ["sample", "source"])
        if "source" not in table.schema.names or "sample" not in table.schema.names:
            continue
        rows = table.filter(pc.is_in(table["sample"].cast(pa.string()), value_set=wanted)).to_pylist()
        found |= {row["sample"]: row["source"] for row in rows if row["source"] is not None}
        if len(found) == len(set(samples)):
            break
    return found
