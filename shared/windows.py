"""Which parts of a clip are taken: windows of so many frames. Pure, over columns of many clips.

A clip offers *places*: its frames or, where frames are taken by time, the moments ``0, 1 / fps, 2 / fps, ...`` at which
something is shown. A window covers as many places as :meth:`Sampling.span` says.

Window 0 is the one in the middle. The further ones lie before and behind it, as many on both sides as fit without
overlap, spread evenly from the clip's ends inwards; they are taken in a fixed order, outermost first and then ever
finer. So the windows of a clip depend on its length alone, and asking for more keeps those that there are.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_SLACK = 1e-6
"""Places by which a duration may be too long for want of exact arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How frames are taken from a clip."""

    frame_interval: int = 1
    """Frames from one taken frame to the next, if they are taken by number."""
    fps: float | None = None
    """Frames a second, if they are taken by time."""

    def span(self, num_frames: int) -> int:
        """Returns how many places a window of so many frames covers."""
        return (num_frames - 1) * self.interval + 1

    @property
    def interval(self) -> int:
        """Places from one taken frame to the next."""
        return self.frame_interval if self.fps is None else 1

    def num_places(
        self, num_frames: npt.NDArray[np.integer], duration: npt.NDArray[np.float64], is_image: npt.NDArray[np.bool_]
    ) -> Integers:
        """Returns how many places clips (N,) offer.

        Args:
            num_frames: (N,), of each clip.
            duration: (N,), in seconds.
            is_image: (N,): these offer one.
        """
        if self.fps is None:
            return num_frames.astype(np.int64)
        by_time = np.ceil(np.nan_to_num(duration) * self.fps - _SLACK).astype(np.int64)
        return np.where(is_image, 1, np.maximum(by_time, np.minimum(num_frames, 1)))


def centre_start(num_places: int, span: int) -> int:
    """Returns where the window in the middle of a clip starts."""
    assert num_places >= span, (num_places, span)
    return (num_places - span) // 2


def num_windows(num_places: Integers, span: int, most: int) -> Integers:
    """Returns how many windows (N,) are taken of clips: as many as fit without overlap around the middle one.

    Args:
        num_places: (N,), of each clip; at least ``span``.
        span: Places of a window.
        most: Windows a clip.
    """
    return np.minimum(most, 1 + 2 * ((num_places - span) // 2 // span))


def window_starts(num_places: Integers, span: int, number: int) -> Integers:
    """Returns where window ``number`` starts (N,) in clips that have it.

    Args:
        num_places: (N,), of each clip.
        span: Places of a window.
        number: 0 for the middle one; odd ones lie before it, even ones behind it.
    """
    free = num_places - span
    before = free // 2
    if number == 0:
        return before
    a_side = before // span
    kinds, kind_of = np.unique(a_side, return_inverse=True)
    step = np.array([_inwards(int(count), (number - 1) // 2) for count in kinds], np.int64)[kind_of]
    starts: Integers = step * (before if number % 2 else free - before) // a_side
    return starts if number % 2 else free - starts


@lru_cache(maxsize=1 << 16)
def _inwards(count: int, place: int) -> int:
    """Returns which of the windows of a side (0 outermost) is taken as number ``place``: by halves, then quarters.

    Args:
        count: Of the windows of a side.
        place: Below ``count``.
    """
    order: dict[int, None] = {}
    denominator = 1
    while len(order) <= place:
        numerators = [0] if denominator == 1 else range(1, denominator, 2)
        order.update((numerator * count // denominator, None) for numerator in numerators)
        denominator *= 2
    return list(order)[place]
