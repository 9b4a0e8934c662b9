"""What is to be stored, from wherever it is known: options, a manifest, or an existing cache."""

from dataclasses import dataclass

from storage_estimates.bits import BitsTable
from storage_estimates.estimate import Choice, Encoders, Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The samples to be stored, and what is known of their encoders and of how they compress."""

    groups: tuple[Group, ...]
    bits: BitsTable
    text_channels: int
    max_tokens: int
    encoders: Encoders | None = None
    """Of an existing cache or of the models that were calibrated; None: of the preset."""
    choice: Choice | None = None
    """How an existing cache stores them."""
    notes: tuple[str, ...] = ()
    """What the user should know of how they were counted."""
