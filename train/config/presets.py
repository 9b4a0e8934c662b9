"""Named sets of options that repeat published stages of training.

Sources: the configurations of Open-Sora 1.0 (``configs/opensora/train``) and 1.2 (``configs/opensora-v1-2/train``).
What those say of frame rates, of buckets and their batch sizes belongs to the cache and to the machine, and is left to
the command line; their seed and their steps, too. ``finetune-24gb`` is ours.
"""

from typing import Any, Literal, get_args

from shared.errors import InputError

Preset = Literal[
    "opensora-v1-16x256",
    "opensora-v1-16x512",
    "opensora-v1-64x512",
    "opensora-v1.2-stage1",
    "opensora-v1.2-stage2",
    "opensora-v1.2-stage3",
    "finetune-24gb",
]

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

_V1_2: dict[str, Any] = {
    "model": "stdit3-xl/2",
    "objective": "rectified-flow",
    "flow_times": "logit-normal",
    "flow_shift": True,
    "caption_dropout": 0.1,
    "lr": 1e-4,
    "adam_eps": 1e-15,
    "weight_decay": 0.0,
    "gradient_clip": 1.0,
    "ema_decay": 0.99,
    "zero_stage": 2,
    "precision": "bfloat16",
}
_MASKED_HEADS = ("image_head", "image_tail", "image_head_tail")


def _masks(random: float, interpolate: float, quarter: float, image_random: float, *images: float) -> tuple[str, ...]:
    ratios = {"random": random, "interpolate": interpolate}
    ratios |= {f"quarter_{side}": quarter for side in ("random", "head", "tail", "head_tail")}
    ratios |= {"image_random": image_random, **dict(zip(_MASKED_HEADS, images, strict=True))}
    return tuple(f"{name}={ratio:g}" for name, ratio in ratios.items() if ratio)


_PRESETS: dict[str, dict[str, Any]] = {
    "opensora-v1-16x256": _V1 | {"model_settings": ("space_scale=0.5", "time_scale=1.0"), "buckets": ("16x256x256",)},
    "opensora-v1-16x512": _V1 | {"model_settings": ("space_scale=1.0", "time_scale=1.0"), "buckets": ("16x512x512",)},
    "opensora-v1-64x512": _V1
    | {
        "model_settings": ("space_scale=1.0", f"time_scale={2 / 3}"),
        "buckets": ("64x512x512",),
        "activation_checkpointing": "full",
    },
    "opensora-v1.2-stage1": _V1_2,
    "opensora-v1.2-stage2": _V1_2
    | {
        "warmup_steps": 1000,
        "freeze": ("y_embedder",),
        "mask_ratios": _masks(0.05, 0.005, 0.005, 0.025, 0.05, 0.025, 0.025),
        "activation_checkpointing": "full",
    },
    "opensora-v1.2-stage3": _V1_2
    | {
        "warmup_steps": 1000,
        "freeze": ("y_embedder",),
        "mask_ratios": _masks(0.01, 0.002, 0.002, 0.0, 0.22, 0.005, 0.005),
        "activation_checkpointing": "full",
    },
    "finetune-24gb": {
        "lora_rank": 32,
        "lr": 1e-4,
        "warmup_steps": 100,
        "ema_decay": 0.999,
        "batch_size": 8,
        "gradient_accumulation": 4,
        "activation_checkpointing": "full",
        "device_memory_gib": 23.5,
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
