"""The differences between published state dicts and the models' own: what is made anew, and what has another shape."""

from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import InputError
from train.model.positions import rotary_frequencies

POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed_spatial")
"""Tensors of published files that the models make for the size at hand."""
NULL_CAPTION, PATCHES, ROTARY = "y_embedder.y_embedding", "x_embedder.proj.weight", "rope.freqs"


def adapt_published_state(model: nn.Module, state: dict[str, Any], prefix: str = "", *_: object) -> None:
    """Makes a published state dict fit, in place: a hook before loading.

    Positions are dropped, and rotary frequencies too, if they are the usual ones. The null caption is cut, or extended
    by the rows that the model was made with. Patches of images are given a time axis.

    Raises:
        InputError: for other rotary frequencies, which the model cannot have.
    """
    for name in POSITIONS:
        state.pop(prefix + name, None)
    frequencies = state.pop(prefix + ROTARY, None)
    if frequencies is not None:
        usual = rotary_frequencies(2 * frequencies.numel())
        if not torch.allclose(frequencies.detach().to("cpu", torch.float32), usual, rtol=2**-7):  # as bfloat16 has them
            raise InputError(f"{prefix}{ROTARY}: not the frequencies of theta 10,000, which are the only ones known")
    given, own = state.get(prefix + NULL_CAPTION), dict(model.named_buffers()).get(NULL_CAPTION)
    if given is not None and own is not None and given.shape[0] != own.shape[0] and given.shape[1] == own.shape[1]:
        state[prefix + NULL_CAPTION] = torch.cat([given[: own.shape[0]], own[given.shape[0] :].to(given)])
    patches: Tensor | None = state.get(prefix + PATCHES)
    if patches is not None and patches.ndim == 4:
        state[prefix + PATCHES] = patches.unsqueeze(2)
