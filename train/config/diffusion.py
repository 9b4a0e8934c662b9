"""What the model learns to undo."""

from dataclasses import dataclass

from shared.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionOptions:
    """What the model learns to undo, and how often without the caption."""

    caption_dropout: float = 0.1
    """How often the null caption is trained, for guidance."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout < 1:
            raise InputError(f"caption_dropout={self.caption_dropout}: expected 0 <= p < 1")
