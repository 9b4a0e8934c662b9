"""The model of a run."""

import train.model
from train.config import ParallelOptions
from train.model.config import ModelConfig
from train.model.transformer import DiffusionTransformer


def build_model(config: ModelConfig, options: ParallelOptions) -> DiffusionTransformer:
    """Returns a run's model, newly initialised, on the device that is PyTorch's default.

    Args:
        config: The architecture.
        options: Which attention kernel, and what is computed again.
    """
    return train.model.build_model(
        config,
        attention_backend=options.attention_backend,
        activation_checkpointing=options.activation_checkpointing,
    )
