"""What a run tells, where and how often."""

from dataclasses import dataclass

from train.config.settings import MayChange, require_at_least, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """What a run tells, where and how often."""

    log_every: MayChange[int] = 10
    """Steps from one line of the log to the next."""
    peak_tflops: MayChange[float | None] = None
    """Dense bfloat16 peak of one device, the base of MFU; known for common GPUs, measured elsewhere."""
    tensorboard: MayChange[bool] = False
    """Also write TensorBoard's event files, to OUTPUT/tensorboard."""

    wandb: MayChange[str | None] = None
    """Also log to Weights & Biases, to this project; its settings are read from the environment (WANDB_MODE ...)."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "log_every")
        require_positive(self, "peak_tflops")
