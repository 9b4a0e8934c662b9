"""Video and image autoencoders as diffusers builds them: the class, and what differs from its default configuration.

Not every one can be used by ``preprocess``; they are here to be measured, and so that the estimator's strides can be
held against the classes themselves. Pure: the classes are named, not imported.
"""

from dataclasses import dataclass, field
from typing import Any

_KL_IMAGE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_RES, _VIT = "ResBlock", "EfficientViTBlock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """An autoencoder's class and configuration."""

    class_name: str
    """In diffusers."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the published checkpoint sets other than the class's defaults."""
    video: bool
    """Takes (B, 3, T, height, width), else (B, 3, height, width)."""


ARCHITECTURES: dict[str, Architecture] = {
    "sd": Architecture(class_name="AutoencoderKL", config=_KL_IMAGE, video=False),
    "sdxl": Architecture(class_name="AutoencoderKL", config={**_KL_IMAGE, "scaling_factor": 0.13025}, video=False),
    "cogvideox": Architecture(class_name="AutoencoderKLCogVideoX", video=True),
    "wan2.1": Architecture(class_name="AutoencoderKLWan", video=True),
    "hunyuanvideo": Architecture(class_name="AutoencoderKLHunyuanVideo", video=True),
    "ltx": Architecture(class_name="AutoencoderKLLTXVideo", video=True),
    "dc-ae-f32c32": Architecture(
        class_name="AutoencoderDC",
        config={
            "encoder_block_types": (_RES, _RES, _RES, _VIT, _VIT, _VIT),
            "decoder_block_types": (_RES, _RES, _RES, _VIT, _VIT, _VIT),
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
        },
        video=False,
    ),
    "dc-ae-f64c128": Architecture(
        class_name="AutoencoderDC",
        config={
            "latent_channels": 128,
            "encoder_block_types": (_RES, _RES, _RES, _VIT, _VIT, _VIT, _VIT),
            "decoder_block_types": (_RES, _RES, _RES, _VIT, _VIT, _VIT, _VIT),
            "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
            "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
            "encoder_layers_per_block": (0, 4, 8, 2, 2, 2, 2),
            "decoder_layers_per_block": (0, 5, 10, 2, 2, 2, 2),
            "encoder_qkv_multiscales": ((),) * 7,
            "decoder_qkv_multiscales": ((),) * 7,
        },
        video=False,
    ),
}
"""By the names that ``storage_estimates --vae-preset`` takes. SD and SDXL as stabilityai publishes them; CogVideoX,
Wan 2.1, HunyuanVideo and LTX-Video 0.9 are the defaults of their classes; DC-AE as mit-han-lab's ``dc-ae-f32c32-sana``
and ``dc-ae-f64c128-in``."""
