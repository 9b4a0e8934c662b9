"""Published weights in our models, and ours as published ones.

Loaded by name: Open-Sora v1.0 (``.pth``), STDiT3 (``model.safetensors`` with ``config.json``), PixArt-alpha as a start
for STDiT or DiT, the DiT of labels, and weights that were trained here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import InputError
from shared.wording import counted
from train.model.config import DiTConfig, ModelConfig, STDiT3Config, STDiTConfig, config_from_values
from train.model.positions import rotary_frequencies, spatial_positions, temporal_positions
from train.model.published_layout import NULL_CAPTION, PATCHES, ROTARY, adapt_published_state
from train.model.transformer import DiffusionTransformer
from train.model.weight_files import WeightFile, read_weights, write_weights

_NAMED_IN_ERRORS = 3
_TIME_ATTENTION = ".attn_temp."


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What of a model came from a file."""

    source: str
    loaded: int
    """Parameters and buffers that the file gave."""
    as_initialised: tuple[str, ...]
    """Those that the file does not have, and that stay as they were: of PixArt-alpha, attention along time."""
    reinitialised: tuple[str, ...]
    """Those that were left as they were on request."""

    def line(self) -> str:
        """Returns the line for people."""
        kept = [
            f"{_some(names)} {reason}"
            for names, reason in (
                (self.as_initialised, "not in the file: as initialised"),
                (self.reinitialised, "as initialised, as asked for"),
            )
            if names
        ]
        return "; ".join([f"{self.source}: {self.loaded} tensors loaded", *kept])


def load_weights(model: DiffusionTransformer, source: str | Path, *, reinit: Sequence[str] = ()) -> LoadReport:
    """Loads published weights, or weights trained here, into a model, by name.

    Args:
        model: Of the architecture that the weights are for; on the CPU or a device, in any dtype.
        source: See :func:`train.model.weight_files.read_weights`.
        reinit: Modules, by the beginning of their parameters' names, that keep their initial weights: for another
            autoencoder ``("x_embedder", "final_layer")``, for another text encoder ``("y_embedder",)``.

    Raises:
        InputError: if the file cannot be read, or its names or shapes are not the model's: one line with the first few.
    """
    return load_state(model, read_weights(source), reinit=reinit)


def load_state(model: DiffusionTransformer, file: WeightFile, *, reinit: Sequence[str] = ()) -> LoadReport:
    """Loads weights that were read; see :func:`load_weights`."""
    own = dict(model.state_dict())
    reinitialised = tuple(name for name in own if name.startswith(tuple(f"{prefix}." for prefix in reinit)))
    for prefix in reinit:
        if not any(name.startswith(f"{prefix}.") for name in own):
            modules = dict.fromkeys(name.split(".")[0] for name in own)
            raise InputError(f"reinit={prefix!r}: the model has no such module: choose from {', '.join(modules)}")
    state = dict(file.tensors)
    adapt_published_state(model, state)
    state = {name: tensor for name, tensor in state.items() if name not in reinitialised}

    is_of_images = isinstance(model.config, STDiTConfig) and not any(_TIME_ATTENTION in name for name in state)
    missing = [name for name in own if name not in state and name not in reinitialised]
    as_initialised = tuple(name for name in missing if is_of_images and _TIME_ATTENTION in name)
    absent = [name for name in missing if name not in as_initialised]
    unknown = [name for name in state if name not in own]
    if absent or unknown:
        raise InputError(
            f"{file.source}: weights of another model than this {type(model).__name__}: "
            + "; ".join(
                [f"not in the file: {_some(absent)}"] * bool(absent)
                + [f"not in the model: {_some(unknown)}"] * bool(unknown)
            )
            + ": choose the model that they are for"
        )
    _require_shapes(model.config, file.source, state, own)
    model.load_state_dict(state, strict=False)
    return LoadReport(source=file.source, loaded=len(state), as_initialised=as_initialised, reinitialised=reinitialised)


def stdit3_config(file: WeightFile) -> STDiT3Config:
    """Returns the configuration of published STDiT3 weights.

    Raises:
        InputError: if there is none, or it asks for what this model does not do.
    """
    values = file.config
    if values is None or values.get("model_type", "STDiT3") != "STDiT3":
        raise InputError(f"{file.source}: no config.json of an STDiT3: name the model and its settings")
    known = {field.name for field in fields(STDiT3Config)}
    settings = {name: value for name, value in values.items() if name in known and name != "input_size"}
    return config_from_values(settings, STDiT3Config(qk_norm=False))  # upstream's default


def write_published(path: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Writes a model's weights in the layout in which such weights are published.

    That is a folder with ``model.safetensors`` and ``config.json`` for STDiT3, and one file, ``.safetensors`` or
    ``.pth``, for the others.

    Args:
        path: The folder or file.
        config: The model's.
        state: The model's state dict, or the average of its weights.

    Raises:
        InputError: for a file of another kind.
    """
    write_weights(path, published_state(config, state), _published_config(config))


def published_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict as published: with the positions of ``config.input_size``, or the rotary frequencies."""
    result = dict(state)
    frames, rows, columns = config.grid(config.input_size)
    cpu = torch.device("cpu")
    match config:
        case STDiT3Config():
            result[ROTARY] = rotary_frequencies(config.head_size)
        case STDiTConfig():
            space, time = config.space_scale_of(rows, columns), config.time_scale_of(frames)
            result["pos_embed"] = spatial_positions(config.hidden_size, rows, columns, space, cpu)
            result["pos_embed_temporal"] = temporal_positions(config.hidden_size, frames, time, cpu)
        case DiTConfig(num_classes=int()):
            space = config.space_scale_of(rows, columns)
            result["pos_embed"] = spatial_positions(config.hidden_size, rows, columns, space, cpu)
            if config.patch_size[0] == 1:
                result[PATCHES] = result[PATCHES].squeeze(2)
    return result


def _published_config(config: ModelConfig) -> dict[str, Any] | None:
    if not isinstance(config, STDiT3Config):
        return None
    values: dict[str, Any] = {
        "architectures": ["STDiT3"],
        "model_type": "STDiT3",
        "drop_path": 0.0,
        "enable_flash_attn": False,
        "enable_layernorm_kernel": False,
        "enable_sequence_parallelism": False,
        "freeze_y_embedder": False,
        "only_train_temporal": False,
        "skip_y_embedder": False,
        "torch_dtype": "float32",
    }
    return values | asdict(config) | {"input_size": [None, None, None], "patch_size": list(config.patch_size)}


def _require_shapes(config: ModelConfig, source: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises :class:`InputError` for tensors of other shapes, saying what they are about where that is known."""
    other = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    if not other:
        return
    hints = []
    if PATCHES in other and state[PATCHES].shape[1] != config.in_channels:
        hints.append(
            f"it is for latents of {state[PATCHES].shape[1]} channels, the model for {config.in_channels}: train on "
            'latents of its autoencoder, or begin those layers anew with reinit "x_embedder" and "final_layer"'
        )
    captions = state.get(NULL_CAPTION)
    if captions is not None and NULL_CAPTION in other and captions.shape[1] != config.caption_channels:
        hints.append(
            f"it is for captions of {captions.shape[1]} channels, the model for {config.caption_channels}: use its "
            'text encoder, or begin those layers anew with reinit "y_embedder"'
        )
    shapes = [f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}" for name in other]
    hints = hints or ["choose the model and settings that it is for"]
    raise InputError(f"{source}: {counted(len(other), 'weight')} of other shapes: {_some(shapes)}: {'; '.join(hints)}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED_IN_ERRORS])
    return shown if len(names) <= _NAMED_IN_ERRORS else f"{shown} and {len(names) - _NAMED_IN_ERRORS} more"
