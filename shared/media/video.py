"""Decoding: the frames of a clip that a bucket asks for, resized and cropped. PyAV only, no torch."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from shared.spec import Bucket


class MediaError(Exception):
    """A clip that cannot be used; it goes to the ledger.

    Args:
        reason: A short name to group by.
        detail: What was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def media_error(path: Path, error: av.FFmpegError, reason: str) -> MediaError:
    """Returns the refusal for an error of FFmpeg: ``reason``, unless the file could not be read at all."""
    if isinstance(error, FileNotFoundError):
        return MediaError("missing", f"no file {path}")
    if isinstance(error, PermissionError | ConnectionError | TimeoutError):
        return MediaError("not_readable", f"{path}: {error.strerror}")
    return MediaError(reason, f"{path}: {error.strerror}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Which frames of a clip are taken: ``num_frames`` of them, every ``interval``-th, from ``start`` on."""

    start: int
    interval: int
    num_frames: int


def span(num_frames: int, interval: int) -> int:
    """Returns how many source frames a window covers."""
    return (num_frames - 1) * interval + 1


def centre_window(num_clip_frames: int, *, num_frames: int, interval: int) -> Window:
    """Returns the window in the middle of a clip that is long enough for it."""
    covered = span(num_frames, interval)
    assert num_clip_frames >= covered, (num_clip_frames, covered)
    return Window(start=(num_clip_frames - covered) // 2, interval=interval, num_frames=num_frames)


def open_media(path: Path) -> av.container.InputContainer:
    """Opens a media file for reading; titles and the like may be in any encoding.

    Raises:
        av.FFmpegError: if the file cannot be read.
    """
    return av.open(str(path), metadata_errors="replace")


def presentation_times(path: Path) -> list[int]:
    """Returns the time of every presented frame of the first video stream, sorted, in the stream's time base.

    Reads packets without decoding them.

    Raises:
        MediaError: if there is no video stream, or packets carry no times.
        av.FFmpegError: if the file cannot be read.
    """
    times: list[int] = []
    with open_media(path) as container:
        if not container.streams.video:
            raise MediaError("no_video_stream", f"{path} has no video stream")
        for packet in container.demux(container.streams.video[0]):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    raise MediaError("no_times", f"{path} has frames without a time")
                times.append(packet.pts)
    return sorted(times)


def decode_window(path: Path, window: Window, bucket: Bucket) -> np.ndarray:
    """Returns the window's frames in the bucket's size: (num_frames, height, width, 3), uint8, RGB.

    Frames are found by their exact times, after a seek to the key frame before the first. Each is turned upright,
    resized (bicubic, antialiased) so that it covers the bucket, and cropped to its centre.

    Raises:
        MediaError: if a frame cannot be decoded.
    """
    try:
        times = presentation_times(path)
        wanted = times[window.start :: window.interval][: window.num_frames]
        frames = _decode_at(path, wanted, bucket, seek=True) or _decode_at(path, wanted, bucket, seek=False)
    except av.FFmpegError as error:
        raise media_error(path, error, "not_decodable") from None
    if frames is None or len(wanted) < window.num_frames:
        raise MediaError("frames_missing", f"{path}: not all of {window.num_frames} frames could be decoded")
    return np.stack(frames)


def _decode_at(path: Path, times: list[int], bucket: Bucket, *, seek: bool) -> list[np.ndarray] | None:
    """Returns the frames presented at these times, or None if one of them does not appear."""
    frames: list[np.ndarray] = []
    with open_media(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 1
        if seek:
            container.seek(times[0], stream=stream, backward=True, any_frame=False)
        for frame in container.decode(stream):
            if frame.is_corrupt or frame.pts is None or frame.pts > times[len(frames)]:
                return None
            if frame.pts == times[len(frames)]:
                frames.append(_fit(frame, bucket))
                if len(frames) == len(times):
                    return frames
    return None


def _fit(frame: av.VideoFrame, bucket: Bucket) -> np.ndarray:
    image = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90))
    scale = max(bucket.height / image.height, bucket.width / image.width)
    crop_height, crop_width = bucket.height / scale, bucket.width / scale
    top, left = (image.height - crop_height) / 2, (image.width - crop_width) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + crop_width, image.width), min(top + crop_height, image.height))
    return np.asarray(image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box))
