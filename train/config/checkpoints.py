"""When a run is saved, and what is kept."""

from dataclasses import dataclass

from train.config.settings import MayChange, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """When a run is saved, and what is kept."""

    checkpoint_every: MayChange[int] = 1000
    """Steps from one checkpoint to the next; the last step always has one."""
    keep_checkpoints: MayChange[int] = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "checkpoint_every", "keep_checkpoints")
