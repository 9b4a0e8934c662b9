"""The models by name. They import no deepspeed, no torch.distributed and nothing of the trainer."""

from typing import Any

from shared.errors import InputError
from train.model.attention import AttentionBackend
from train.model.checkpointing import ActivationCheckpointing, Recomputation
from train.model.config import DiTConfig, ModelConfig, STDiT3Config, STDiTConfig, config_from_values
from train.model.dit import DiT, LabelDiT
from train.model.stdit import STDiT
from train.model.stdit3 import STDiT3
from train.model.transformer import DiffusionTransformer

_XL: dict[str, Any] = {"depth": 28, "hidden_size": 1152, "num_heads": 16}
_S: dict[str, Any] = {"depth": 12, "hidden_size": 384, "num_heads": 6}
_TI: dict[str, Any] = {"depth": 6, "hidden_size": 192, "num_heads": 3}

PRESETS: dict[str, ModelConfig] = {
    "stdit-xl/2": STDiTConfig(**_XL),
    "stdit-s/2": STDiTConfig(**_S),
    "stdit-ti/2": STDiTConfig(**_TI),
    "stdit3-3b/2": STDiT3Config(depth=28, hidden_size=1872, num_heads=26),
    "stdit3-xl/2": STDiT3Config(**_XL),
    "stdit3-s/2": STDiT3Config(**_S),
    "stdit3-ti/2": STDiT3Config(**_TI),
    "dit-xl/2": DiTConfig(**_XL),
    "dit-s/2": DiTConfig(**_S),
    "dit-ti/2": DiTConfig(**_TI),
}


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Returns the configuration of the model ``name`` with ``overrides`` put in.

    Raises:
        InputError: for an unknown name or override, naming the choices.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}: choose from {', '.join(PRESETS)}")
    return config_from_values(overrides, PRESETS[name])


def build_model(
    config: ModelConfig,
    *,
    attention_backend: AttentionBackend | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    checkpointed_blocks: int | None = None,
) -> DiffusionTransformer:
    """Returns the model that a configuration determines, newly initialised.

    Args:
        config: The architecture: its type says which model.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: What the backward pass computes again, see :mod:`train.model.checkpointing`.
        checkpointed_blocks: Of how many blocks, from the first; those after keep more. None: of all.

    Raises:
        InputError: for an unknown way of checkpointing, or more blocks than there are.
    """
    model = _new_model(config, attention_backend, activation_checkpointing)
    if checkpointed_blocks is not None:
        model.checkpoint_blocks(Recomputation(mode=activation_checkpointing, blocks=checkpointed_blocks))
    return model


def _new_model(
    config: ModelConfig, attention_backend: AttentionBackend | None, activation_checkpointing: ActivationCheckpointing
) -> DiffusionTransformer:
    match config:
        case STDiTConfig():
            return STDiT(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
        case STDiT3Config():
            return STDiT3(
                config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing
            )
        case DiTConfig():
            kind = DiT if config.num_classes is None else LabelDiT
            return kind(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
    raise AssertionError(f"{type(config).__name__} is no model's configuration")


def create_model(
    name: str,
    *,
    attention_backend: AttentionBackend | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    checkpointed_blocks: int | None = None,
    **overrides: Any,
) -> DiffusionTransformer:
    """Returns the model ``name``, newly initialised.

    Args:
        name: A key of ``PRESETS``.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: What the backward pass computes again, see :mod:`train.model.checkpointing`.
        checkpointed_blocks: Of how many blocks, from the first; those after keep more. None: of all.
        overrides: Settings of the model's configuration that differ from the preset.

    Raises:
        InputError: for an unknown name or override, naming the choices; for more blocks than there are.
    """
    return build_model(
        model_config(name, **overrides),
        attention_backend=attention_backend,
        activation_checkpointing=activation_checkpointing,
        checkpointed_blocks=checkpointed_blocks,
    )
