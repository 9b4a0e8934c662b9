"""Low-rank additions to linear layers, by peft: put into a model, merged into its weights, written as an adapter.

A layer ``W x`` becomes ``W x + (alpha / rank) B A x`` (arXiv 2106.09685); A is random, B begins at zero.
"""

import importlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from shared.errors import InputError
from train.config import FinetuningOptions
from train.model.weight_files import write_weights

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
_BLOCKS = r"(?:blocks|spatial_blocks|temporal_blocks)\.\d+\."


def require_peft() -> None:
    """Raises :class:`InputError` if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("--lora-rank: the package peft is not installed: pip install 'latentmill[lora]'")


def scale_of(options: FinetuningOptions) -> float:
    """Returns by what the additions are multiplied."""
    assert options.lora_rank is not None
    return (options.lora_alpha or options.lora_rank) / options.lora_rank


def target_pattern(options: FinetuningOptions) -> str:
    """Returns the regular expression of the layers' names that get additions."""
    return rf"{_BLOCKS}.*\.(?:{'|'.join(map(re.escape, options.lora_targets))})"


def add_lora(model: nn.Module, options: FinetuningOptions) -> None:
    """Puts additions into a model, in place; from then on nothing else is trained.

    Args:
        model: On any device.
        options: With a rank.

    Raises:
        InputError: if peft is not installed.
    """
    require_peft()
    peft = importlib.import_module("peft")  # takes seconds: not for --help
    settings = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or options.lora_rank,
        target_modules=target_pattern(options),
    )
    peft.inject_adapter_in_model(settings, model)


def has_lora(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a model with additions."""
    return any(name.endswith(_A) for name in state)


def merged_state(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Returns the state dict of the model without additions that computes the same.

    Args:
        state: Of a model with additions, float32.
        scale: See :func:`scale_of`.
    """
    merged = {}
    for name, value in state.items():
        if name.endswith((_A, _B)):
            continue
        layer, _, rest = name.partition(_BASE)
        if rest == "weight":
            value = value + scale * (state[layer + _B] @ state[layer + _A])
        merged[f"{layer}.{rest}" if rest else name] = value
    return merged


def write_adapter(folder: Path, state: Mapping[str, Tensor], options: FinetuningOptions) -> None:
    """Writes the additions as peft reads them: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        folder: Made if it is missing.
        state: Of a model with additions.
        options: Of its run.
    """
    names = {name: f"base_model.model.{name.replace('.default.', '.')}" for name in state if name.endswith((_A, _B))}
    write_weights(folder / "adapter_model.safetensors", {names[name]: state[name] for name in names})
    settings = {
        "peft_type": "LORA",
        "r": options.lora_rank,
        "lora_alpha": options.lora_alpha or options.lora_rank,
        "target_modules": target_pattern(options),
        "base_model_name_or_path": options.init_from,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
