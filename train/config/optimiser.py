"""How weights follow gradients, and their average."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import InputError
from train.config.settings import Adjustable, MayChange, require_at_least, require_positive

_MAX_NAN_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimiserOptions:
    """How the weights follow the gradients, and their moving average."""

    lr: Adjustable[float] = 2e-5
    """Learning rate of AdamW after the warm-up."""
    lr_schedule: Adjustable[Literal["constant", "cosine", "linear"]] = "constant"
    """How the learning rate goes on after the warm-up: it stays, or falls to --final-lr."""
    decay_steps: Adjustable[int | None] = None
    """The step at which a falling learning rate reaches --final-lr; --steps by default."""
    final_lr: Adjustable[float] = 0.0
    """Where a falling learning rate ends."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's mean and of its square's."""
    adam_eps: float = 1e-8
    """AdamW's term beside the root of the squares' mean."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup_steps: Adjustable[int] = 0
    """Steps over which the learning rate rises linearly."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    gradient_accumulation: MayChange[int] = 1
    """Parts in which a rank computes its samples of a step, one after another, to save memory."""
    on_nan: MayChange[Literal["stop", "skip"]] = "stop"
    """At a loss or a gradient that is no finite number: stop, or leave the weights as they are and go on."""
    max_nan_steps: MayChange[int] = _MAX_NAN_STEPS
    """With --on-nan skip: stop all the same after so many such steps in a row."""
    ema_decay: float | None = 0.9999
    """Decay of the weights' moving average; None keeps no average. Early steps use less, see train/ema.py."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "weight_decay", "warmup_steps")
        require_at_least(self, 1, "decay_steps", "gradient_accumulation", "max_nan_steps")
        require_positive(self, "lr", "gradient_clip", "adam_eps")
        if any(not 0 <= beta < 1 for beta in self.adam_betas):
            raise InputError(f"adam_betas={self.adam_betas}: expected 0 <= beta < 1")
        if self.lr_schedule == "constant" and (self.decay_steps is not None or self.final_lr):
            raise InputError("decay_steps and final_lr do nothing with a constant lr: use --lr-schedule, or leave them")
        if not 0 <= self.final_lr <= self.lr:
            raise InputError(f"final_lr={self.final_lr}: expected 0 to lr={self.lr}")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise InputError(f"decay_steps={self.decay_steps}: expected more than warmup_steps={self.warmup_steps}")
        if self.on_nan == "stop" and self.max_nan_steps != _MAX_NAN_STEPS:
            raise InputError(f"max_nan_steps={self.max_nan_steps} does nothing without --on-nan skip")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay}: expected 0 < decay < 1, or None")
