"""What a clip is and which of its frames are taken. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = float | bool | str | None
"""Of a manifest's column that is not one of ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Where the bytes of a clip lie."""

    url: str
    """An absolute local path, or the URL of an object."""
    offset: int | None = None
    """If it is a member of a tar: the first of its bytes."""
    size: int | None = None
    """If it is a member of a tar: its bytes."""

    def __str__(self) -> str:
        return self.url if self.offset is None else f"{self.url} (bytes {self.offset}+{self.size})"


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeRange:
    """A part of a clip, from ``start`` up to but not including ``end``, in seconds from its first frame."""

    start: float
    end: float | None = None
    """None: to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A clip of the manifest."""

    source: str
    """Its name as the manifest gives it; of a member of a tar, SHARD.tar/MEMBER."""
    media: Media
    captions: tuple[str, ...]
    time_range: TimeRange | None = None
    """None: all of it."""
    columns: Mapping[str, Value] = field(default_factory=dict)
    """What else the manifest says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Which frames of a clip (of its time range, if it has one) are taken.

    By number: every ``interval``-th frame from number ``start`` on. By time: those that are shown at
    ``start / fps``, ``(start + 1) / fps``, ... seconds after the first.
    """

    start: int
    num_frames: int
    interval: int = 1
    fps: float | None = None
    """Frames a second; None: by number."""
    flip: bool = False
    """Mirrored left to right."""


def span(num_frames: int, interval: int) -> int:
    """Returns how many source frames a window by number covers."""
    return (num_frames - 1) * interval + 1


def centre_window(num_clip_frames: int, *, num_frames: int, interval: int) -> Window:
    """Returns the window by number in the middle of a clip that is long enough for it."""
    covered = span(num_frames, interval)
    assert num_clip_frames >= covered, (num_clip_frames, covered)
    return Window(start=(num_clip_frames - covered) // 2, num_frames=num_frames, interval=interval)
