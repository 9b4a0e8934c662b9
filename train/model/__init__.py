"""The models by name. They import no deepspeed, no torch.distributed and nothing of the trainer."""

from typing import Any

from shared.errors import InputError
from train.model.attention import AttentionBackend
from train.model.checkpointing import ActivationCheckpointing
from train.model.config import STDiTConfig, config_from_values
from train.model.stdit import STDiT

PRESETS: dict[str, STDiTConfig] = {
    "stdit-xl/2": STDiTConfig(depth=28, hidden_size=1152, num_heads=16),
    "stdit-s/2": STDiTConfig(depth=12, hidden_size=384, num_heads=6),
    "stdit-ti/2": STDiTConfig(depth=6, hidden_size=192, num_heads=3),
}


def model_config(name: str, **overrides: Any) -> STDiTConfig:
    """Returns the configuration of the model ``name`` with ``overrides`` put in.

    Raises:
        InputError: for an unknown name or override, naming the choices.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(PRESETS)}")
    return config_from_values(overrides, PRESETS[name])


def create_model(
    name: str,
    *,
    attention_backend: AttentionBackend | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    **overrides: Any,
) -> STDiT:
    """Returns the model ``name``, newly initialised.

    Args:
        name: A key of ``PRESETS``.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: What the backward pass computes again: ``none``, ``full``, or ``selective``.
        overrides: Settings of :class:`STDiTConfig` that differ from the preset.

    Raises:
        InputError: for an unknown name or override, naming the choices.
    """
    return STDiT(
        model_config(name, **overrides),
        attention_backend=attention_backend,
        activation_checkpointing=activation_checkpointing,
    )
