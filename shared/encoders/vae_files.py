"""Reading an autoencoder's files: its class, its configuration, its weights.

Weights come from safetensors. Where a model has none, diffusers reads its ``.bin`` with ``weights_only``, which loads
tensors and runs no code. No model's own code is ever loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shared.encoders.location import locate
from shared.encoders.opensora_vae import SCALE, SHIFT, SPATIAL_CONFIG, TEMPORAL_CONFIG, OpenSoraVae
from shared.encoders.vae_families import FAMILIES, Family, with_defaults
from shared.encoders.vae_geometry import Config
from shared.errors import InputError
from shared.wording import counted

_UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is known of an autoencoder without its weights."""

    model: str
    """Hub id, folder, or ``demo:vae``."""
    class_name: str
    family: Family
    config: dict[str, Any]
    """With the class's defaults where the file is silent."""


def read_config(model: str) -> Description:
    """Returns what an autoencoder's ``config.json`` says.

    Args:
        model: Hub id, folder, or ``demo:vae``.

    Raises:
        InputError: if there is no such model or it is of a class that is not supported.
    """
    try:
        config = AutoencoderKL.load_config(locate(model))  # of any class: only config.json is read
    except (OSError, ValueError) as error:
        raise InputError(f"VAE {model!r}: no configuration found ({error}): expected a folder or a hub id") from None
    found = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if found not in FAMILIES:
        raise InputError(f"VAE {model!r}: found class {found}: expected one of {', '.join(FAMILIES)}")
    if FAMILIES[found].model_class is OpenSoraVae:
        config = _opensora_config(config)
    else:
        config = with_defaults(FAMILIES[found].model_class, config)
    return Description(model=model, class_name=found, family=FAMILIES[found], config=config)


def load_model(description: Description) -> nn.Module:
    """Returns an autoencoder with its weights in float32 on the CPU, for inference only.

    Raises:
        InputError: if weights are missing or do not fit.
    """
    model, model_class = description.model, description.family.model_class
    try:
        if model_class is OpenSoraVae:
            loaded, faulty = _load_opensora(model, description.config)
        else:
            loaded, found = model_class.from_pretrained(  # type: ignore[attr-defined]
                locate(model), low_cpu_mem_usage=False, output_loading_info=True
            )
            faulty = [*found["missing_keys"], *found["mismatched_keys"]]
    except _UNREADABLE as error:
        raise InputError(f"VAE {model!r}: not loadable ({error}): expected an {description.class_name}") from None
    if faulty:
        raise InputError(
            f"VAE {model!r}: {counted(len(faulty), 'weight')} missing or of another shape, e.g. {faulty[0]}: "
            "expected those of its configuration"
        )
    return loaded.eval().requires_grad_(False)


def _opensora_config(config: Config) -> dict[str, Any]:
    """Returns the arguments of :class:`OpenSoraVae`: the published sizes, unless the file has others."""
    image, time = config.get("vae_2d") or {}, config.get("vae_temporal") or {}
    return {
        "spatial": {**SPATIAL_CONFIG, **(image.get("config") or {})},
        "temporal": {**TEMPORAL_CONFIG, **{key: time[key] for key in TEMPORAL_CONFIG if key in time}},
        "shift": tuple(config.get("shift") or SHIFT),
        "scale": tuple(config.get("scale") or SCALE),
    }


def _load_opensora(model: str, config: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    place = locate(model)
    path = Path(place) / "model.safetensors"
    if not Path(place).is_dir():
        path = Path(hf_hub_download(place, "model.safetensors"))
    vae = OpenSoraVae(**config)
    expected = vae.state_dict()
    weights = {name: expected[name] for name in ("shift", "scale")} | load_file(path)
    faulty = [name for name, tensor in expected.items() if name not in weights or weights[name].shape != tensor.shape]
    if not faulty:
        vae.load_state_dict({name: weights[name].float() for name in expected})
    return vae, faulty
