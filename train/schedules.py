"""The learning rate of each step: pure."""

import math

from train.config import OptimiserOptions


def learning_rate(step: int, options: OptimiserOptions, decay_steps: int) -> float:
    """Returns the learning rate of ``step``, counted from 0: a linear rise, then what the schedule says.

    Args:
        step: Counted from 0.
        options: The rates and the schedule.
        decay_steps: The step at which a falling rate reaches its end.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / (options.warmup_steps + 1)
    if options.lr_schedule == "constant":
        return options.lr
    done = min(1.0, (step - options.warmup_steps) / max(1, decay_steps - options.warmup_steps))
    left = 1 - done if options.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.final_lr + (options.lr - options.final_lr) * left
