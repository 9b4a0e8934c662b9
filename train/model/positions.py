# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Fixed sin-cos positions and the timestep's sinusoid, as Open-Sora v1.0 and, before it, DiT and MAE define them.

Positions depend on the size at hand, so they are made for it and kept, not stored with the weights. What is kept stays
where it is, however many sizes there are: a recorded pass (``train.pass_graphs``) reads it there. So it is what grows
with a frame's sides, not with its area.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

_PERIOD = 10_000.0


def sincos(width: int, positions: Float[Tensor, " N"]) -> Float[Tensor, "N width"]:
    """Returns the sines, then the cosines, of each position at ``width / 2`` frequencies, in float64."""
    frequencies = _PERIOD ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@functools.cache
@torch.inference_mode(False)  # what is kept may be needed for gradients later
def _axis_positions(width: int, count: int, scale: float, device: torch.device) -> Float[Tensor, "N width"]:
    """Returns the positions 0 .. ``count - 1``, divided by ``scale``, in float32."""
    return sincos(width, torch.arange(count) / scale).to(device, torch.float32)


def spatial_positions(
    width: int, rows: int, columns: int, scale: float, device: torch.device
) -> Float[Tensor, "1 S width"]:
    """Returns the positions of the tokens of one frame, row by row, in float32.

    The first half of the channels holds the column, the second half the row: upstream's order.

    Args:
        width: Channels; a multiple of 4.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        scale: Coordinates are divided by it (``space_scale``).
        device: Where the result lies.
    """
    by_column = _axis_positions(width // 2, columns, scale, device)
    by_row = _axis_positions(width // 2, rows, scale, device)
    grid = torch.cat(
        [by_column[None].expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)],
        dim=-1,
    )
    return grid.reshape(1, rows * columns, width)


def temporal_positions(width: int, num_frames: int, scale: float, device: torch.device) -> Float[Tensor, "1 T width"]:
    """Returns the positions of ``num_frames`` frames, divided by ``scale`` (``time_scale``), in float32."""
    return _axis_positions(width, num_frames, scale, device)[None]


def scaled_positions(width: int, rows: int, columns: int, side: Float[Tensor, " B"]) -> Float[Tensor, "B S width"]:
    """Returns the positions of the tokens of one frame in a square, row by row, in float32, for each sample.

    The square is as large as the frame and has ``round(sqrt(rows * columns))`` units a side, so that frames of one area
    and several aspect ratios share it. Source: Open-Sora v1.2.

    Args:
        width: Channels; a multiple of 4.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        side: Divides the coordinates: root of the frame's area in pixels, over that of the square that is not scaled.
    """
    half, base = width // 2, round((rows * columns) ** 0.5)
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=side.device) / half
    frequencies = _PERIOD**-exponents

    def one_axis(count: int) -> Tensor:  # (B, count, half)
        units = torch.arange(count, dtype=torch.float32, device=side.device) * (base / count)
        angles = (units / side.float()[:, None])[:, :, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=2)

    by_column = one_axis(columns)[:, None].expand(-1, rows, -1, -1)
    by_row = one_axis(rows)[:, :, None].expand(-1, -1, columns, -1)
    return torch.cat([by_column, by_row], dim=3).flatten(1, 2)


def rotary_frequencies(width: int) -> Float[Tensor, " width/2"]:
    """Returns the angles, in float32, by which one frame turns each pair of ``width`` channels (arXiv 2104.09864)."""
    return 1.0 / _PERIOD ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


@functools.cache
@torch.inference_mode(False)  # what is kept may be needed for gradients later
def rotary_angles(
    width: int, num_frames: int, device: torch.device
) -> tuple[Float[Tensor, "T width/2"], Float[Tensor, "T width/2"]]:
    """Returns cosines and sines, in float32, of the angles of ``num_frames`` frames."""
    angles = torch.arange(num_frames, dtype=torch.float32)[:, None] * rotary_frequencies(width)
    return angles.cos().to(device), angles.sin().to(device)


def timestep_sinusoid(timestep: Float[Tensor, " B"], width: int) -> Float[Tensor, "B width"]:
    """Returns cosines, then sines, of the timestep, in float32 whatever the model's dtype.

    bfloat16 would round integers above 256, so that neighbouring timesteps became one.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(_PERIOD) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
