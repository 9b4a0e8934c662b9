"""How decoded pictures are turned and mirrored to stand upright."""

import math
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type


@dataclass(frozen=True, kw_only=True, slots=True)
class Orientation:
    """Mirrored left to right first, if so, then turned clockwise."""

    mirrored: bool
    quarter_turns: int
    """Clockwise, 0 .. 3."""

    @property
    def lies(self) -> bool:
        """Whether height and width change places."""
        return self.quarter_turns % 2 == 1

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the picture (H, W, C) upright, a view."""
        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, k=-self.quarter_turns)


UPRIGHT = Orientation(mirrored=False, quarter_turns=0)


def frame_orientation(frame: av.VideoFrame) -> Orientation:
    """Returns how a frame is to be turned, by its display matrix; odd angles count as the nearest quarter turn."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
    mirrored = a * d - b * c < 0
    # The matrix maps right to (a, b) and down to (c, d), in a plane whose second axis points down. A mirror before
    # the turn changes the sign of what right becomes.
    right = (-a, -b) if mirrored else (a, b)
    return Orientation(mirrored=mirrored, quarter_turns=round(math.atan2(right[1], right[0]) / (math.pi / 2)) % 4)


def exif_orientation(value: int) -> Orientation:
    """Returns how an image is to be turned, by the value of its EXIF tag; unknown values say nothing."""
    mirrored, turns = {
        2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 3), 6: (False, 1), 7: (True, 1), 8: (False, 3),
    }.get(value, (False, 0))  # fmt: skip
    return Orientation(mirrored=mirrored, quarter_turns=turns)
