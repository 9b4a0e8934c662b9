"""Pictures in the size of a bucket: they cover it, and what sticks out is cut off evenly.

Resizing costs more than decoding, so frames that shrink to half or less are resized as they are stored, luma and the
smaller chroma planes by themselves, and become RGB afterwards, when few pixels are left. Both steps are linear, so the
order changes rounding alone. Four frames go through at once, as the four bands of one picture: Pillow resizes each band
as it would by itself, bit for bit, in two thirds of the time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

from shared.media.orientation import Orientation, frame_orientation
from shared.spec import Bucket

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""

_REDUCING_GAP = 2.0
"""Of four times the size and more, whole pixels are averaged first, down to at least twice the size."""
_SHRINKING = 2.0
"""From which factor on planes are resized by themselves."""
_TOGETHER = 4
"""Frames whose planes are resized at once: bands of a picture, at most."""
_LEAST_TOGETHER = 3
"""Fewer are faster one by one."""
_PLANAR = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}
_DEEP = {
    "yuv420p10le": "yuv420p", "yuv420p12le": "yuv420p", "yuv422p10le": "yuv422p", "yuv422p12le": "yuv422p",
    "p010le": "yuv420p",
}  # fmt: skip
"""Subsampled formats of more than 8 bits, and those of 8 to which they are brought: always, because FFmpeg makes RGB of
them two levels too dark."""
_MATRICES = {1, 2, 4, 5, 6, 7, 9}
"""FFmpeg's numbers of the colour matrices that its scaler knows; 2 is unspecified, and BT.601."""


def covering_box(height: float, width: float, bucket: Bucket) -> Box:
    """Returns the part of a picture that fills the bucket: its largest centred part of the bucket's shape."""
    scale = max(bucket.height / height, bucket.width / width)
    crop_height, crop_width = bucket.height / scale, bucket.width / scale
    top, left = (height - crop_height) / 2, (width - crop_width) / 2
    return max(left, 0.0), max(top, 0.0), min(left + crop_width, width), min(top + crop_height, height)


def fit_pixels(pixels: np.ndarray, bucket: Bucket, pixel_aspect: float = 1.0) -> np.ndarray:
    """Returns a picture (H, W, 3), uint8, in the bucket's size: bicubic, antialiased.

    Args:
        pixels: The picture.
        bucket: The size.
        pixel_aspect: How much wider than high its pixels are shown.
    """
    box = _stored_box(pixels.shape[0], pixels.shape[1], bucket, pixel_aspect)
    return np.asarray(_resized(Image.fromarray(np.ascontiguousarray(pixels)), bucket, box))


def _stored_box(height: int, width: int, bucket: Bucket, pixel_aspect: float) -> Box:
    left, top, right, bottom = covering_box(height, width * pixel_aspect, bucket)
    return left / pixel_aspect, top, min(right / pixel_aspect, width), bottom


def _resized(image: Image.Image, bucket: Bucket, box: Box) -> Image.Image:
    size = (bucket.width, bucket.height)
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP)


def _is_planar(frame: av.VideoFrame) -> bool:
    """Returns whether a frame is stored as planes of luma and chroma bytes, by a matrix that is known."""
    named = frame.format.name in _PLANAR and frame.colorspace in _MATRICES
    return named and all(plane.line_size > 0 for plane in frame.planes)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What frames have in common that can be resized together."""

    format: str
    size: tuple[int, int]
    orientation: Orientation
    box: Box


class FrameFitter:
    """Brings decoded frames to the size of a bucket: (height, width, 3), uint8, RGB."""

    def __init__(self, bucket: Bucket, pixel_aspect: float) -> None:
        """Frames are to fill ``bucket``; their pixels are shown ``pixel_aspect`` times as wide as high."""
        self._bucket, self._pixel_aspect = bucket, pixel_aspect
        # FFmpeg's scalers, kept over frames: making one costs as much as a frame.
        self._to_rgb, self._to_planar, self._planar_to_rgb = (VideoReformatter() for _ in range(3))
        self._kind: _Kind | None = None
        self._waiting: list[tuple[int, av.VideoFrame]] = []

    def add(self, time: int, frame: av.VideoFrame) -> Iterator[tuple[int, np.ndarray]]:
        """Takes a frame; yields times and pixels, upright, resized and cropped, of those that are ready."""
        orientation = frame_orientation(frame)
        bucket = self._turned(orientation)
        box = _stored_box(frame.height, frame.width, bucket, self._pixel_aspect)
        shrinking = min((box[2] - box[0]) / bucket.width, (box[3] - box[1]) / bucket.height)
        deep = frame.format.name in _DEEP
        if deep or frame.format.name == "nv12":
            planar = _DEEP.get(frame.format.name, "yuv420p")
            frame = self._to_planar.reformat(frame, format=planar, interpolation=Interpolation.BICUBIC, threads=1)
        if not ((deep or shrinking >= _SHRINKING) and _is_planar(frame)):
            rgb = self._to_rgb.reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
            yield time, orientation.apply(np.asarray(_resized(Image.fromarray(rgb.to_ndarray()), bucket, box)))
            return
        kind = _Kind(
            frame.format.name,
            (frame.height, frame.width),
            orientation,
            box,
        )
        if kind != self._kind:
            yield from self.rest()
            self._kind = kind
        self._waiting.append((time, frame))
        if len(self._waiting) == _TOGETHER:
            yield from self.rest()

    def rest(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields times and pixels of the frames that were taken and not yielded."""
        waiting, self._waiting = self._waiting, []
        step = _TOGETHER if len(waiting) >= _LEAST_TOGETHER else 1
        for start in range(0, len(waiting), step):
            part = waiting[start : start + step]
            assert self._kind is not None
            orientation = self._kind.orientation
            fitted = self._fit_planes([frame for _, frame in part], self._turned(orientation), self._kind.box)
            for (time, _), pixels in zip(part, fitted, strict=True):
                yield time, orientation.apply(pixels)

    def _turned(self, orientation: Orientation) -> Bucket:
        """Returns the bucket as frames of an orientation are stored."""
        bucket = self._bucket
        return Bucket(bucket.num_frames, bucket.width, bucket.height) if orientation.lies else bucket

    def _fit_planes(self, frames: Sequence[av.VideoFrame], bucket: Bucket, box: Box) -> Iterator[np.ndarray]:
        """Yields frames of one kind, not upright yet."""
        first = frames[0]
        left, top, right, bottom = box
        planes: list[np.ndarray] = []  # each (height, width, frames)
        for number, plane in enumerate(first.planes):
            across, down = plane.width / first.width, plane.height / first.height
            image = _bands([frame.planes[number] for frame in frames])
            small = _resized(image, bucket, (left * across, top * down, right * across, bottom * down))
            planes.append(np.asarray(small).reshape(bucket.height, bucket.width, -1))
        for number, frame in enumerate(frames):
            small = av.VideoFrame(bucket.width, bucket.height, "yuv444p")
            small.colorspace = frame.colorspace
            small.color_range = ColorRange.JPEG if frame.format.name.startswith("yuvj") else frame.color_range
            for pixels, target in zip(planes, small.planes, strict=True):
                rows = np.frombuffer(target, np.uint8).reshape(bucket.height, target.line_size)
                rows[:, : bucket.width] = pixels[..., number]
            rgb = self._planar_to_rgb.reformat(small, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
            yield rgb.to_ndarray()


def _bands(planes: Sequence[Any]) -> Image.Image:
    """Returns planes of several frames as the bands of one picture; those that are missing for four repeat the last."""
    bands = [
        Image.frombuffer("L", (plane.width, plane.height), plane, "raw", "L", plane.line_size, 1) for plane in planes
    ]
    if len(bands) == 1:
        return bands[0]
    return Image.merge("CMYK", [*bands, *bands[-1:] * (_TOGETHER - len(bands))])  # any mode of four equal bands
