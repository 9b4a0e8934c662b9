"""The learning rate of each step: pure."""

from train.config import OptimiserOptions


def learning_rate(step: int, options: OptimiserOptions) -> float:
    """Returns the learning rate of ``step``, counted from 0."""
    return options.lr * min(1.0, (step + 1) / (options.warmup_steps + 1))
