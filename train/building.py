"""The model of a run."""

from train.config import ParallelOptions
from train.model.config import STDiTConfig
from train.model.stdit import STDiT


def build_model(config: STDiTConfig, options: ParallelOptions) -> STDiT:
    """Returns a run's model, newly initialised, on the device that is PyTorch's default.

    Args:
        config: The architecture.
        options: Which attention kernel, and what is computed again.
    """
    return STDiT(
        config,
        attention_backend=options.attention_backend,
        activation_checkpointing=options.activation_checkpointing,
    )
