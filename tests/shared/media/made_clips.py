"""Small clips made for tests. Every pixel of frame n is grey, 8 n + 10, so that a frame tells its number."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream

from shared.media.clip import Media, TimeRange, Window
from shared.media.video import decode_window
from shared.spec import Bucket

MILLISECOND = Fraction(1, 1000)
LOSSLESS = {"qp": "0", "bf": "2", "g": "7"}


def media_of(path: Path) -> Media:
    """Returns a local file as media."""
    return Media(url=str(path.absolute()))


def grey(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Returns the picture (H, W, 3) of a frame."""
    return np.full((height, width, 3), 8 * number + 10, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Returns which frames these are."""
    return [round((float(frame.mean()) - 10) / 8) for frame in frames]


def encode(
    container: av.container.OutputContainer,
    stream: VideoStream,
    pictures: Sequence[np.ndarray],
    times: Sequence[int],
    tick: Fraction,
) -> None:
    """Writes pictures that are shown at ``times``, in ticks."""
    for picture, time in zip(pictures, times, strict=True):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = time, tick
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_clip(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    times: Sequence[int] | None = None,
    tick: Fraction = MILLISECOND,
    rate: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] = LOSSLESS,
    prepare: Callable[[VideoStream], Any] | None = None,
) -> Path:
    """Writes a clip; without times, its pictures follow each other at ``rate``."""
    if times is None:
        times, tick = range(len(pictures)), Fraction(1, rate)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = tick
        if prepare is not None:
            prepare(stream)
        encode(container, stream, pictures, times, tick)
    return path


def decoded(path: Path, window: Window, bucket: str = "1x32x32", time_range: TimeRange | None = None) -> np.ndarray:
    """Returns the frames of a window, in a bucket's size."""
    return decode_window(media_of(path), time_range, window, Bucket.parse(bucket))
