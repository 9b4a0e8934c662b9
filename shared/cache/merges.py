"""Which shards compaction merges. Pure."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shared.cache import layout
from shared.cache.snapshot import ShardRecord

SAMPLE_OVERHEAD = 4096
"""Bytes a sample takes in a shard besides its payloads, at most about so many: headers, padding, its JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardUse:
    """What of a shard is live."""

    record: ShardRecord
    num_samples: int
    num_bytes: int
    """Of the payloads that a merged shard would take over from it."""

    @property
    def merged_bytes(self) -> int:
        """What it would add to a merged shard, at most about."""
        return self.num_bytes + SAMPLE_OVERHEAD * self.num_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Shards that become one."""

    sources: tuple[ShardUse, ...]
    """By name; all of one folder and container, encoded alike."""


def plan_merges(uses: Iterable[ShardUse], shard_bytes: int) -> list[Merge]:
    """Returns the merges that leave no small shards, but for one a folder, container and way of encoding.

    A shard of whose bytes more than a quarter of ``shard_bytes`` is live stays. So does one that would be merged with
    no other, unless more than half of it is dead.

    Args:
        uses: Of all shards with something live.
        shard_bytes: Of a merged shard at most.
    """
    groups: dict[tuple[str, str, str, str], list[ShardUse]] = defaultdict(list)
    for use in uses:
        if use.merged_bytes <= shard_bytes // 4:
            record = use.record
            container = layout.container_of(record.shard)
            groups[record.folder, container, record.clips_root, record.environment].append(use)
    merges = []
    for _, small in sorted(groups.items()):
        waiting: list[ShardUse] = []
        num_bytes = 0
        for use in sorted(small, key=lambda use: use.record.shard):
            if num_bytes + use.merged_bytes > shard_bytes:
                merges.append(Merge(sources=tuple(waiting)))
                waiting, num_bytes = [], 0
            waiting.append(use)
            num_bytes += use.merged_bytes
        merges.append(Merge(sources=tuple(waiting)))
    return [merge for merge in merges if len(merge.sources) > 1 or _is_mostly_dead(merge.sources[0])]


def _is_mostly_dead(use: ShardUse) -> bool:
    return 2 * use.merged_bytes < use.record.num_bytes
