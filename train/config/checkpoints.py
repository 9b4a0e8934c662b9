"""When a run is saved, and what is kept."""

from dataclasses import dataclass

from shared.errors import InputError
from train.config.settings import MayChange, require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """When a run is saved, and what is kept."""

    checkpoint_every: MayChange[int] = 1000
    """Steps from one checkpoint to the next; the last step always has one."""
    keep_checkpoints: MayChange[int] = 3
    """Newest checkpoints to keep."""
    keep_every: MayChange[int | None] = None
    """Keep those after a multiple of so many steps as well, for good."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "checkpoint_every", "keep_checkpoints", "keep_every")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise InputError(
                f"keep_every={self.keep_every} is not a multiple of checkpoint_every={self.checkpoint_every}: there "
                "would be nothing to keep after most of those steps"
            )
