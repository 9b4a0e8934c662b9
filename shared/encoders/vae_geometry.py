"""Channels and strides of autoencoders, by their class, from a configuration alone.

Free of torch and diffusers, which take seconds to import: who only wants to know whether a size suits a model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.encoders.location import model_folder
from shared.spec import VaeGeometry

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """How a class's geometry follows from its configuration."""

    geometry: Callable[[Config], VaeGeometry]
    defaults: Config
    """Of what it reads, where a configuration is silent: those of the class."""


_RULES: dict[str, _Rule] = {
    "AutoencoderKL": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["latent_channels"], spatial_stride=2 ** (len(config["block_out_channels"]) - 1)
        ),
        defaults={"latent_channels": 4, "block_out_channels": (64,)},
    ),
    "AutoencoderDC": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["latent_channels"],
            spatial_stride=2 ** (len(config["encoder_block_out_channels"]) - 1),
        ),
        defaults={"latent_channels": 32, "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024)},
    ),
    "AutoencoderKLCogVideoX": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["latent_channels"],
            spatial_stride=2 ** (len(config["block_out_channels"]) - 1),
            temporal_stride=int(config["temporal_compression_ratio"]),
        ),
        defaults={
            "latent_channels": 16,
            "block_out_channels": (128, 256, 256, 512),
            "temporal_compression_ratio": 4,
        },
    ),
    "AutoencoderKLWan": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["z_dim"],
            spatial_stride=2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1),
            temporal_stride=2 ** sum(config["temperal_downsample"]),
        ),
        defaults={
            "z_dim": 16,
            "dim_mult": (1, 2, 4, 4),
            "patch_size": None,
            "temperal_downsample": (False, True, True),
        },
    ),
    "AutoencoderKLHunyuanVideo": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["latent_channels"],
            spatial_stride=config["spatial_compression_ratio"],
            temporal_stride=config["temporal_compression_ratio"],
        ),
        defaults={"latent_channels": 16, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    ),
    "AutoencoderKLLTXVideo": _Rule(
        geometry=lambda config: VaeGeometry(
            latent_channels=config["latent_channels"],
            spatial_stride=config["spatial_compression_ratio"]
            or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"]),
            temporal_stride=config["temporal_compression_ratio"]
            or config["patch_size_t"] * 2 ** sum(config["spatio_temporal_scaling"]),
        ),
        defaults={
            "latent_channels": 128,
            "spatial_compression_ratio": None,
            "temporal_compression_ratio": None,
            "patch_size": 4,
            "patch_size_t": 1,
            "spatio_temporal_scaling": (True, True, True, False),
        },
    ),
}


def geometry_by(class_name: str) -> Callable[[Config], VaeGeometry]:
    """Returns how the geometry of one of diffusers' autoencoders follows from its configuration.

    Args:
        class_name: As ``config.json`` has it; one that this project knows.
    """
    rule = _RULES[class_name]

    def geometry(config: Config) -> VaeGeometry:
        given = {key: value for key, value in config.items() if value is not None}
        return rule.geometry({**rule.defaults, **given})

    return geometry


def geometry_on_disk(model: str) -> VaeGeometry | None:
    """Returns an autoencoder's geometry if its files are on this machine and its class is among diffusers'; else None.

    Args:
        model: Hub id, folder, or ``demo:vae``.
    """
    folder = model_folder(model)
    try:
        config = json.loads((folder / "config.json").read_text()) if folder is not None else {}
        return geometry_by(config["_class_name"])(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads the model says what is wrong
        return None
