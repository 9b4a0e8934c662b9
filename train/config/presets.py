"""Named sets of options that repeat published stages of training.

Sources: the configurations of Open-Sora 1.0 (``configs/opensora/train``) and 1.2 (``configs/opensora-v1-2/train``).
What those say of frame rates, of buckets and their batch sizes belongs to the cache and to the machine, and is left to
the command line; their seed and their steps, too.
"""

from typing import Any, Literal, get_args

from shared.errors import InputError

Preset = Literal["opensora-v1-16x256", "opensora-v1-16x512", "opensora-v1-64x512"]

_V1: dict[str, Any] = {
    "model": "stdit-xl/2",
    "caption_dropout": 0.1,
    "lr": 2e-5,
    "weight_decay": 0.0,
    "gradient_clip": 1.0,
    "ema_decay": 0.9999,
    "zero_stage": 2,
    "precision": "bfloat16",
}

_PRESETS: dict[str, dict[str, Any]] = {
    "opensora-v1-16x256": _V1 | {"model_settings": ("space_scale=0.5", "time_scale=1.0"), "buckets": ("16x256x256",)},
    "opensora-v1-16x512": _V1 | {"model_settings": ("space_scale=1.0", "time_scale=1.0"), "buckets": ("16x512x512",)},
    "opensora-v1-64x512": _V1
    | {
        "model_settings": ("space_scale=1.0", f"time_scale={2 / 3}"),
        "buckets": ("64x512x512",),
        "activation_checkpointing": "full",
    },
}


def preset_values(name: str) -> dict[str, Any]:
    """Returns the options that a preset sets, by name.

    Raises:
        InputError: for an unknown preset.
    """
    if name not in _PRESETS:
        raise InputError(f"--preset {name}: choose from {', '.join(get_args(Preset))}")
    return _PRESETS[name]
