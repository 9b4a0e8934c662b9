"""Small models of every kind, with inputs, for tests."""

from typing import Any

import torch

from train.model import create_model
from train.model.transformer import DiffusionTransformer

SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 3, "caption_channels": 16, "model_max_length": 9}
KINDS = ("stdit-ti/2", "stdit3-ti/2", "dit-ti/2", "dit-ti/2 of labels")


def small_model(kind: str, **options: Any) -> DiffusionTransformer:
    """Returns a model whose weights are past the zeros of the initial ones, which would hide mistakes."""
    torch.manual_seed(0)
    name, _, labels = kind.partition(" ")
    model = create_model(name, **SMALL | ({"num_classes": 5} if labels else {}) | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(kind: str, *, size: tuple[int, int, int] = (2, 4, 6), batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Returns the arguments of a forward pass; images for labels."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "x": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.linspace(3, 950, batch),
        "y": torch.randn(batch, 1, 9, 16, generator=generator),
        "mask": (torch.arange(9) < torch.tensor([9, 2, 5, 1])[:batch, None]).long(),
    }
    if kind.startswith("stdit3"):
        values |= {
            "fps": torch.tensor([24.0, 8.0, 120.0, 30.0])[:batch],
            "height": torch.full((batch,), 8.0 * size[1]),
            "width": torch.full((batch,), 8.0 * size[2]),
        }
    if kind.endswith("labels"):
        values |= {"x": values["x"][:, :, :1], "y": torch.tensor([4, 0, 2, 3])[:batch], "mask": None}
    return values


def one_of(values: dict[str, Any], row: int) -> dict[str, Any]:
    """Returns the arguments for one sample of a batch."""
    return {name: value if value is None else value[row : row + 1] for name, value in values.items()}
