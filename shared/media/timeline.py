"""When the frames of a clip are shown, and which of them a window takes. Pure.

A frame is shown from its time until the next one's. Times in seconds come rounded: Matroska keeps milliseconds, so do
manifests. Hence a frame that begins up to half a millisecond after a moment counts as shown at it.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from shared.media.clip import TimeRange, Window

_TOLERANCE = Fraction(501, 1_000_000)
"""Seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The presented frames of a clip, or of a part of it."""

    times: Sequence[int]
    """When each is shown first, ascending, in ticks."""
    end: int
    """When the last is shown no more, in ticks."""
    tick: Fraction
    """In seconds."""

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame until the last is shown no more."""
        return (self.end - self.times[0]) * self.tick if self.times else Fraction(0)

    @property
    def mean_rate(self) -> Fraction | None:
        """Frames a second; None if one frame or none says nothing of it."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / ((self.times[-1] - self.times[0]) * self.tick)

    def part(self, time_range: TimeRange | None) -> "Timeline":
        """Returns the frames whose times lie in a range of seconds from the first frame."""
        if time_range is None or not self.times:
            return self
        start = self._ticks(time_range.start)
        low, high, end = bisect_left(self.times, start), len(self.times), self.end
        if time_range.end is not None and math.isfinite(time_range.end):
            stop = self._ticks(time_range.end)
            high = max(low, bisect_left(self.times, stop))
            shown_until = self.times[high] if high < len(self.times) else self.end
            asked_until = self.times[0] + round(Fraction(time_range.end) / self.tick)
            end = min(shown_until, max(asked_until, self.times[high - 1] + 1)) if high > low else self.end
        return Timeline(times=self.times[low:high], end=end, tick=self.tick)

    def _ticks(self, seconds: float) -> int:
        """Returns the first tick that counts as ``seconds`` after the first frame or later."""
        if seconds == math.inf:
            return self.end + 1
        return self.times[0] + math.ceil((Fraction(seconds) - _TOLERANCE) / self.tick)

    def taken(self, window: Window) -> list[int] | None:
        """Returns the times in ticks of the frames that a window takes, or None if it reaches beyond them.

        By time, one frame may be taken several times.
        """
        if window.fps is None:
            times = self.times[window.start :: window.interval][: window.num_frames]
            return list(times) if len(times) == window.num_frames else None
        step = 1 / Fraction(window.fps).limit_denominator(100_000)
        moments = [(window.start + number) * step for number in range(window.num_frames)]
        if not self.times or moments[-1] >= self.duration:
            return None
        shown = [math.floor((moment + _TOLERANCE) / self.tick) + self.times[0] for moment in moments]
        return [self.times[bisect_right(self.times, tick) - 1] for tick in shown]
