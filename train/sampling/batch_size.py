"""How many clips are sampled at once: what the memory holds by a count, so that it is the same each time."""

import os

import torch
from torch import Tensor

from train.conditions import denoiser
from train.model import build_model
from train.model.transformer import DiffusionTransformer
from train.planning.allocations import Allocations
from train.sampling.latents import ClipSize, conditions_of

MOST = 8
"""More gain nothing: a clip alone fills a GPU but for small ones."""
_SHARE = 0.85
"""Of a device's memory; the rest is lost to fragments, or held by others."""


def usual_batch(
    model: DiffusionTransformer, size: ClipSize, caption: tuple[int, int], device: torch.device, *, guidance: float
) -> int:
    """Returns how many clips are sampled at once where nobody says how many.

    Args:
        model: On the device, as everything else that is to stay there.
        size: Of the clips.
        caption: Tokens of the longest prompt, and its channels.
        device: Where they are sampled.
        guidance: 1 is no guidance.
    """
    if device.type == "cuda":
        total, held = torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_allocated(device)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        held = sum(weights.nbytes for weights in (*model.parameters(), *model.buffers()))
    return most_clips(model, size, caption, room=_SHARE * total - held, guidance=guidance)


def most_clips(
    model: DiffusionTransformer, size: ClipSize, caption: tuple[int, int], *, room: float, guidance: float
) -> int:
    """Returns how many clips a forward pass can have within ``room`` bytes: 1 to :data:`MOST`. The rest as above."""
    with torch.device("meta"):
        without_content = build_model(model.config)
    without_content.to(model.dtype).eval()
    one, two = (forward_bytes(without_content, size, caption, number, guidance=guidance) for number in (1, 2))
    return max(1, min(MOST, 1 + int((room - one) // (two - one))))


def forward_bytes(
    model: DiffusionTransformer, size: ClipSize, caption: tuple[int, int], number: int, *, guidance: float
) -> int:
    """Returns the most bytes that sampling holds at once besides the weights.

    Args:
        model: Without content, in evaluation mode.
        size: Of the clips.
        caption: Tokens of a prompt, and its channels.
        number: Clips.
        guidance: 1 is no guidance.
    """
    copies = 2 if guidance != 1 else 1
    allocations = Allocations()
    with torch.no_grad(), allocations:
        allocations.leave_out(*model.parameters(), *model.buffers())
        captions = [torch.empty(caption, device="meta") for _ in range(number)]
        told = conditions_of(captions, size, guidance=guidance)
        x = torch.empty(number, model.config.in_channels, *size.latent, device="meta")
        timestep = torch.empty(copies * number, device="meta")
        prediction: Tensor = denoiser(model, told, wants_size=model.wants_size)(torch.cat([x] * copies), timestep)
        del prediction
    return allocations.peak
