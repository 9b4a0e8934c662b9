"""What a check of a cache finds."""

from dataclasses import dataclass
from typing import Literal

Remedy = Literal["none", "set aside", "encode again"]
"""What a repair does: nothing, move the object out of the readers' way, drop what a shard's payloads belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not as the index says, or that no reader sees."""

    path: str
    """Below the cache's root."""
    what: str
    """What was found, what was expected."""
    remedy: Remedy = "none"
    is_fault: bool = True
    """False for leftovers and for what was superseded: notes."""


def note(path: str, what: str) -> Finding:
    """Returns a finding that harms no reader."""
    return Finding(path=path, what=what, is_fault=False)
