"""Which products of a model may be computed in 8 bits, whether they can be, and having them computed so.

It is the products of blocks over tokens. Those over a sample's caption or timestep are few operations, and the
embeddings and the last layer, where precision tells most, are too.
"""

import torch

from shared.errors import InputError
from train.model.config import ModelConfig
from train.model.layers import Linear
from train.model.transformer import DiffusionTransformer
from train.ops.float8 import MULTIPLE

TOKEN_PRODUCTS = ("qkv", "proj", "q_linear", "fc1", "fc2")
"""Names of blocks' layers that read tokens."""

_FIRST_CAPABILITY = (8, 9)


def has_float8_units(device: torch.device) -> bool:
    """Whether a device computes products in 8 bits: GPUs from Ada and Hopper on; a CPU computes what they would."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY


def require_float8_units(device: torch.device) -> None:
    """Raises :class:`InputError` if a device cannot compute products in 8 bits."""
    if not has_float8_units(device):
        major, minor = torch.cuda.get_device_capability(device)
        least = ".".join(map(str, _FIRST_CAPABILITY))
        raise InputError(
            f"products=float8: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, products "
            f"in 8 bits need {least} or more: leave the option out"
        )


def require_float8_widths(config: ModelConfig) -> None:
    """Raises :class:`InputError` if a width of a model does not suit products in 8 bits."""
    for name, width in (("hidden_size", config.hidden_size), ("the MLP's width", config.mlp_size)):
        if width % MULTIPLE:
            raise InputError(f"products=float8: {name}={width} is not a multiple of {MULTIPLE}: leave the option out")


def token_products(model: DiffusionTransformer) -> list[Linear]:
    """Returns the layers of a model's blocks that read tokens, without what LoRA put around them."""
    return [
        module
        for block in model.transformer_blocks()
        for name, module in block.named_modules()
        if isinstance(module, Linear) and name.removesuffix(".base_layer").rpartition(".")[2] in TOKEN_PRODUCTS
    ]


def compute_in_float8(model: DiffusionTransformer, *, wanted: bool = True) -> None:
    """Has a model's products over tokens computed in 8 bits from here on, or no longer."""
    for layer in token_products(model):
        layer.float8 = wanted
