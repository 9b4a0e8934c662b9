"""Which kernel computes a model's attention in space, or among all tokens, when a variant of it runs."""

import torch

from train.benchmark.variants import Variant
from train.model.attention import AttentionBackend, automatic_backend
from train.model.config import DiTConfig, ModelConfig

ATTENTION_NAMES: dict[AttentionBackend, str] = {
    "cudnn": "cuDNN",
    "flash": "PyTorch's flash",
    "efficient": "PyTorch's efficient",
    "math": "PyTorch's math",
    "flash-attn": "flash-attn 2",
    "flash-attn-3": "flash-attn 3",
}
"""The kernels as tables show them."""


def attention_of(
    variant: Variant, config: ModelConfig, latent_size: tuple[int, int, int], device: torch.device
) -> AttentionBackend:
    """Returns the kernel, in bfloat16.

    Args:
        variant: How the model runs.
        config: The model.
        latent_size: Frames, rows and columns.
        device: Where it runs; on a CPU the variant has no say.
    """
    if device.type == "cuda" and variant.backend is not None:
        return variant.backend
    frames, rows, columns = config.grid(latent_size)
    length = rows * columns * (frames if isinstance(config, DiTConfig) else 1)
    packed = not config.normalises_queries
    return automatic_backend(device, torch.bfloat16, length=length, head_width=config.head_size, packed=packed)
