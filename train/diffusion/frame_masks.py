"""Which frames of a clip are given rather than made, so that a model learns to continue, to connect and to animate.

The strategies are those of Open-Sora v1.2's ``MaskGenerator`` (``opensora/utils/train_utils.py``), over latent frames.
A mask is True at frames that are made. Everything is a pure function of the number of frames and of uniform draws.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from shared.errors import InputError

MaskStrategy = Literal[
    "identity",
    "random",
    "interpolate",
    "quarter_random",
    "quarter_head",
    "quarter_tail",
    "quarter_head_tail",
    "image_random",
    "image_head",
    "image_tail",
    "image_head_tail",
]
"""What is given: nothing; 10 to 90 % of the frames; every second one; up to a quarter of the frames anywhere, at the
head, at the tail, at both; one frame likewise."""

STRATEGIES: tuple[MaskStrategy, ...] = get_args(MaskStrategy)
_PUBLISHED_SPELLING = {"intepolate": "interpolate"}
NUM_DRAWS = 3
"""Uniform draws that choose strategy, length and place; one more a frame decides the frames of ``random``."""

Draws = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def parse_mask_ratios(settings: Sequence[str]) -> dict[MaskStrategy, float]:
    """Returns how often each strategy is taken, from settings like ``image_head=0.1``; the rest is ``identity``.

    Raises:
        InputError: if one is not STRATEGY=RATIO, or they add up to more than 1.
    """
    ratios: dict[MaskStrategy, float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        strategy = _strategy(_PUBLISHED_SPELLING.get(name, name))
        try:
            ratio = float(text)
        except ValueError:
            ratio = math.nan
        if strategy is None:
            raise InputError(f"mask_ratios {setting!r}: unknown strategy {name!r}: choose from {', '.join(STRATEGIES)}")
        if not 0 <= ratio <= 1:
            raise InputError(f"mask_ratios {setting!r}: expected STRATEGY=RATIO with a ratio of 0 to 1")
        if strategy in ratios:
            raise InputError(f"mask_ratios {setting!r}: {strategy} is given twice")
        ratios[strategy] = ratio
    total = math.fsum(ratios.values())
    if total > 1 + 1e-6 or ("identity" in ratios and total < 1 - 1e-6):
        raise InputError(
            f"mask_ratios: they add up to {total:g}: expected {'1' if 'identity' in ratios else 'at most 1'}"
        )
    ratios.setdefault("identity", max(0.0, 1 - total))
    return ratios


def _strategy(name: str) -> MaskStrategy | None:
    return next((strategy for strategy in STRATEGIES if strategy == name), None)


def choose_strategy(ratios: Mapping[MaskStrategy, float], draw: float) -> MaskStrategy:
    """Returns the strategy in whose share of [0, 1) a draw lies."""
    end = 0.0
    for strategy, ratio in ratios.items():
        end += ratio
        if draw < end:
            return strategy
    return "identity"  # rounding left a gap before 1


def frame_mask(strategy: MaskStrategy, num_frames: int, draws: Draws) -> Mask:
    """Returns which frames (T,) are made. One is, at least: where nothing would be left, the last.

    Args:
        strategy: What to give.
        num_frames: Latent frames; a single one is always made.
        draws: (2 + T,) from [0, 1): for the length of what is given, its place, and for each frame.
    """
    mask = np.ones(num_frames, dtype=np.bool_)
    if num_frames == 1 or strategy == "identity":
        return mask
    if strategy == "random":
        mask = draws[2 : 2 + num_frames] > 0.1 + 0.8 * draws[0]
    elif strategy == "interpolate":
        mask[int(2 * draws[0]) :: 2] = False
    else:
        kind, _, where = strategy.partition("_")
        length = 1 if kind == "image" else 1 + int(max(1, num_frames // 4) * draws[0])
        if where == "random":
            start = int((num_frames - length + 1) * draws[1])
            mask[start : start + length] = False
        if "head" in where:
            mask[:length] = False
        if "tail" in where:
            mask[-length:] = False
    if not mask.any():
        mask[-1] = True
    return mask


def frame_masks(ratios: Mapping[MaskStrategy, float], num_frames: int, draws: Draws) -> Mask:
    """Returns which frames (B, T) of each sample are made.

    Args:
        ratios: How often each strategy is taken, see :func:`parse_mask_ratios`.
        num_frames: Latent frames.
        draws: (B, 3 + T) from [0, 1), see :func:`train.draws.draw_for_masks`.
    """
    return np.stack([frame_mask(choose_strategy(ratios, row[0]), num_frames, row[1:]) for row in draws])
