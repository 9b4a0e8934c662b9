"""Which nodes are kept from work, since workers die there again and again while others get on. Pure: no Ray, no clock
but the times given.

A clip that kills workers must not look like a broken node: deaths count against a node only if no one shard explains
all of them. And where everything fails, nothing is a node's fault: then ``preprocess.schedule`` stops the job.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

MOST_DEATHS = 3
"""Workers in a row that a node may lose, nothing encoded there between them, while others get on."""
_LEAST_REST, _LONGEST_REST = 10.0, 300.0
"""Seconds for which a node gets no worker after the second death in a row, doubled with each further one."""


@dataclass(kw_only=True, slots=True)
class _Deaths:
    """Of workers of one node, in a row."""

    number: int = 0
    shards: set[str] | None = None
    """That each of them had in hand."""
    while_loading: bool = True
    """Whether all of them died before they had work."""
    through_before: int = 0
    """Shards that had come through elsewhere when the first of them died."""
    rests_until: float = 0.0


@dataclass(kw_only=True, slots=True)
class NodeHealth:
    """The nodes of a job, by Ray's identities."""

    excluded: dict[str, str] = field(default_factory=dict)
    """Nodes that get no more work, and why."""
    _deaths: dict[str, _Deaths] = field(default_factory=dict)
    _through: dict[str, int] = field(default_factory=dict)

    def came_through(self, node: str) -> None:
        """Takes note that a worker of a node has committed a shard."""
        self._through[node] = self._through.get(node, 0) + 1
        self._deaths.pop(node, None)

    def died(self, node: str, cause: str, *, shards: Collection[str] | None, others: bool, now: float) -> bool:
        """Takes note that a worker died.

        Args:
            node: Where.
            cause: Of what, one line.
            shards: That may have killed it, by the shards that were planned; None if it died before it had work, which
                no clip explains.
            others: Whether there are other nodes for its work: without them, none is kept from it.
            now: Seconds.

        Returns:
            Whether the node is excluded by this.
        """
        elsewhere = self._elsewhere(node)
        deaths = self._deaths.setdefault(node, _Deaths(through_before=elsewhere))
        deaths.number += 1
        deaths.while_loading &= shards is None
        deaths.shards = set(shards or ()) if deaths.shards is None else deaths.shards & set(shards or ())
        if not others:
            return False
        others_get_on = deaths.while_loading or elsewhere > deaths.through_before
        if deaths.number >= MOST_DEATHS and not deaths.shards and others_get_on:
            return self.exclude(node, f"{deaths.number} workers in a row died there, the last: {cause}")
        if deaths.number > 1:
            deaths.rests_until = now + min(_LEAST_REST * 2 ** (deaths.number - 2), _LONGEST_REST)
        return False

    def exclude(self, node: str, cause: str) -> bool:
        """Keeps a node from work from now on; returns whether it was not before."""
        is_new = node not in self.excluded
        self.excluded.setdefault(node, cause)
        return is_new

    def num_deaths(self, node: str) -> int:
        """Returns how many workers in a row the node has lost."""
        return self._deaths[node].number if node in self._deaths else 0

    def avoided(self, now: float) -> frozenset[str]:
        """Returns the nodes that get no worker now: those that are excluded, and those that rest after deaths."""
        resting = (node for node, deaths in self._deaths.items() if deaths.rests_until > now)
        return frozenset([*self.excluded, *resting])

    def _elsewhere(self, node: str) -> int:
        return sum(count for other, count in self._through.items() if other != node)
