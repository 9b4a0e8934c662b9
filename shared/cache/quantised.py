"""The int8 codec: values as multiples of a step per channel, latents optionally as differences from their neighbours.

Steps lie on a grid of 8 an octave, so that one byte tells a step. A channel's step comes from its standard deviation
and the aimed signal to noise ratio. It is larger where the channel's largest value would leave int8 (nothing is ever
clipped), and smaller where the rounding errors of few values happen to add up to more noise than is usual. A text's few
loud channels get the finest steps that int8 allows: this costs next to nothing, and their noise would turn its tokens.

Letters: C latent channels, T latent frames, H and W latent rows and columns, L caption tokens, D text channels,
N values of one channel.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from shared.codec import Codec
from shared.errors import InputError

Int8s = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

_STEPS_AN_OCTAVE = 8
_MOST_DB_BELOW_AIM = 1.5
_LOUD = 8
_FRAMES, _COLUMNS = 1, 2


def quantise(values: Floats, codec: Codec) -> Int8s:
    """Returns the stored array of ``values``, (C, T, H, W) or (L, D), as ``shared.codec.stored_shape`` says.

    Raises:
        InputError: if a value is too large for the largest step.
    """
    if values.ndim == 2:
        k, quantised = _quantise_columns(values, codec, finest_if_loud=True)
        return np.concatenate([k[None], quantised])
    C = len(values)
    k, columns = _quantise_columns(values.reshape(C, math.prod(values.shape[1:])).T, codec, finest_if_loud=False)
    quantised = np.ascontiguousarray(columns.T)
    if not codec.delta:
        return np.concatenate([k[:, None], quantised], axis=1)
    kinds, differences = _smallest_differences(quantised.reshape(values.shape))
    return np.concatenate([k[:, None], kinds[:, None], differences.reshape(quantised.shape)], axis=1)


def dequantise_into(stored: Int8s, codec: Codec, out: torch.Tensor) -> None:
    """Writes what ``quantise`` stored into ``out``, (C, T, H, W) or (L, D).

    Raises:
        InputError: if a channel's differences are of a kind that does not exist.
    """
    if out.ndim == 2:
        steps, quantised = _steps(stored[0]), stored[1:].copy()
    else:
        steps, quantised = _steps(stored[:, 0])[:, None], stored[:, 2 if codec.delta else 1 :].copy()
        if codec.delta:
            _undo_differences(stored[:, 1], quantised.view(np.uint8).reshape(out.shape))
    flat = out.view(quantised.shape)
    torch.mul(torch.from_numpy(quantised), torch.from_numpy(steps), out=flat)


def _steps(k: Int8s) -> Floats:
    return np.exp2(k.astype(np.float64) / _STEPS_AN_OCTAVE).astype(np.float32)


def _quantise_columns(values: Floats, codec: Codec, *, finest_if_loud: bool) -> tuple[Int8s, Int8s]:
    """Returns the exponent k of each column's step, ``2 ** (k / 8)``, and the multiples.

    Args:
        values: (N, channels).
        codec: Says the aim.
        finest_if_loud: Give columns that vary eight times as much as the median column the finest step.
    """
    assert codec.sqnr_db is not None
    if not values.size:
        return np.zeros(values.shape[1], np.int8), np.zeros(values.shape, np.int8)
    deviation = values.std(axis=0, dtype=np.float64)
    largest = np.abs(values).max(axis=0).astype(np.float64)
    with np.errstate(divide="ignore"):
        finest = np.maximum(np.ceil(_STEPS_AN_OCTAVE * np.log2(largest / 127)), -128)
        # Rounding to a step's nearest multiple leaves noise of step / sqrt(12).
        aimed = np.round(_STEPS_AN_OCTAVE * np.log2(math.sqrt(12) * 10 ** (-codec.sqnr_db / 20) * deviation))
    k = np.maximum(aimed, finest)
    if finest_if_loud and deviation.any():
        k = np.where(deviation > _LOUD * np.median(deviation[deviation > 0]), finest, k)
    if k.max() > 127:
        raise InputError(f"codec {codec}: a value is not finite or out of range (largest magnitude {largest.max():g})")
    quantised = np.rint(values / _steps(k.astype(np.int8))).astype(np.int8)
    most_noise = deviation * 10 ** (-(codec.sqnr_db - _MOST_DB_BELOW_AIM) / 20)
    open_columns = np.flatnonzero(k > finest)
    while open_columns.size:
        some = values[:, open_columns]
        noise = quantised[:, open_columns] * _steps(k[open_columns].astype(np.int8)) - some
        noisy = np.sqrt(np.mean(np.square(noise, dtype=np.float64), axis=0)) > most_noise[open_columns]
        open_columns = open_columns[noisy]
        k[open_columns] -= 1
        quantised[:, open_columns] = np.rint(some[:, noisy] / _steps(k[open_columns].astype(np.int8)))
        open_columns = open_columns[k[open_columns] > finest[open_columns]]
    return k.astype(np.int8), quantised


def _smallest_differences(quantised: Int8s) -> tuple[Int8s, Int8s]:
    """Returns for each channel of (C, T, H, W) which differences have the least entropy, (C,), and these.

    Differences wrap around.
    """
    kinds = np.zeros(len(quantised), np.int8)
    smallest, least = quantised, _entropies(quantised)
    for kind in (_FRAMES, _COLUMNS, _FRAMES | _COLUMNS):
        if kind & _FRAMES and quantised.shape[1] < 2:
            continue
        differences = quantised
        if kind & _FRAMES:
            differences = np.diff(differences, axis=1, prepend=np.int8(0))
        if kind & _COLUMNS:
            differences = np.diff(differences, axis=3, prepend=np.int8(0))
        entropies = _entropies(differences)
        better = entropies < least
        kinds[better], least[better] = kind, entropies[better]
        smallest = np.where(better[:, None, None, None], differences, smallest)
    return kinds, smallest


def _entropies(channels: Int8s) -> npt.NDArray[np.float64]:
    """Returns the order-0 entropy of each channel's (T, H, W) values, in bits of all of them together."""
    entropies = np.zeros(len(channels))
    for number, channel in enumerate(channels):
        counts = np.bincount(channel.reshape(-1).view(np.uint8))
        counts = counts[counts > 0]
        entropies[number] = (counts * np.log2(channel.size / counts)).sum()
    return entropies


def _undo_differences(kinds: Int8s, values: npt.NDArray[np.uint8]) -> None:
    """Sums the differences of (C, T, H, W) up, in place; sums wrap around."""
    wrong = np.flatnonzero((kinds < 0) | (kinds > (_FRAMES | _COLUMNS)))
    if wrong.size:
        raise InputError(
            f"payload is damaged: channel {wrong[0]} has differences of kind {kinds[wrong[0]]}, expected 0 to 3"
        )
    for kind in (_COLUMNS, _FRAMES):
        differing = (kinds & kind).astype(bool)
        if not differing.any():
            continue
        channels = values if differing.all() else values[differing]
        if kind == _COLUMNS:
            torch.cumsum(torch.from_numpy(channels), 3, dtype=torch.uint8, out=torch.from_numpy(channels))
        else:
            for frame in range(1, channels.shape[1]):
                channels[:, frame] += channels[:, frame - 1]
        if channels is not values:
            values[differing] = channels
