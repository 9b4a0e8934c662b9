"""Initial weights, chosen by parameters' names, as the published recipes have them."""

import torch
from torch import nn


@torch.no_grad()
def initialise(
    model: nn.Module, *, as_made: tuple[str, ...], zero: tuple[str, ...], normal: tuple[str, ...] = ()
) -> None:
    """Gives a model its initial weights: xavier for what is not named, each parameter's outputs being its first axis.

    Args:
        model: Just built.
        as_made: Ends of the names of parameters that stay as they are.
        zero: Likewise, set to zero. So is every other bias.
        normal: Likewise, drawn with a standard deviation of 0.02.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(as_made):
            continue
        if name.endswith(("bias", *zero)):
            nn.init.zeros_(parameter)
        elif normal and name.endswith(normal):
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
