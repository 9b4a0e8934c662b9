"""How weights follow gradients, and their average."""

from dataclasses import dataclass

from shared.errors import InputError
from train.config.settings import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserOptions:
    """How the weights follow the gradients, and their moving average."""

    lr: float = 2e-5
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float | None = 0.9999
    """Decay of the weights' moving average; None keeps no average. Early steps use less, see train/ema.py."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "weight_decay", "warmup_steps")
        require_positive(self, "lr", "gradient_clip")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay}: expected 0 < decay < 1, or None")
