"""Pictures in the size of a bucket: they cover it, and what sticks out is cut off evenly.

Resizing costs more than decoding, so frames that shrink to half or less are resized as they are stored, luma and the
smaller chroma planes by themselves, and become RGB afterwards, when few pixels are left. Both steps are linear, so the
order changes rounding alone.
"""

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

from shared.media.orientation import frame_orientation
from shared.spec import Bucket

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""

_REDUCING_GAP = 2.0
"""Of four times the size and more, whole pixels are averaged first, down to at least twice the size."""
_SHRINKING = 2.0
"""From which factor on planes are resized by themselves."""
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


class FrameFitter:
    """Brings decoded frames to the size of a bucket: (height, width, 3), uint8, RGB."""

    def __init__(self, bucket: Bucket, pixel_aspect: float) -> None:
        """Frames are to fill ``bucket``; their pixels are shown ``pixel_aspect`` times as wide as high."""
        self._bucket, self._pixel_aspect = bucket, pixel_aspect
        # FFmpeg's scalers, kept over frames: making one costs as much as a frame.
        self._to_rgb, self._to_planar, self._planar_to_rgb = (VideoReformatter() for _ in range(3))

    def fit(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns a frame upright, resized and cropped."""
        orientation = frame_orientation(frame)
        bucket = self._bucket
        if orientation.lies:
            bucket = Bucket(bucket.num_frames, bucket.width, bucket.height)
        box = _stored_box(frame.height, frame.width, bucket, self._pixel_aspect)
        shrinking = min((box[2] - box[0]) / bucket.width, (box[3] - box[1]) / bucket.height)
        deep = frame.format.name in _DEEP
        if deep or frame.format.name == "nv12":
            planar = _DEEP.get(frame.format.name, "yuv420p")
            frame = self._to_planar.reformat(frame, format=planar, interpolation=Interpolation.BICUBIC, threads=1)
        if (deep or shrinking >= _SHRINKING) and _is_planar(frame):
            pixels = self._fit_planes(frame, bucket, box)
        else:
            rgb = self._to_rgb.reformat(frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
            pixels = np.asarray(_resized(Image.fromarray(rgb.to_ndarray()), bucket, box))
        return orientation.apply(pixels)

    def _fit_planes(self, frame: av.VideoFrame, bucket: Bucket, box: Box) -> np.ndarray:
        small = av.VideoFrame(bucket.width, bucket.height, "yuv444p")
        small.colorspace = frame.colorspace
        small.color_range = ColorRange.JPEG if frame.format.name.startswith("yuvj") else frame.color_range
        left, top, right, bottom = box
        for source, target in zip(frame.planes, small.planes, strict=True):
            across, down = source.width / frame.width, source.height / frame.height
            image = Image.frombuffer("L", (source.width, source.height), source, "raw", "L", source.line_size, 1)
            plane = _resized(image, bucket, (left * across, top * down, right * across, bottom * down))
            rows = np.frombuffer(target, np.uint8).reshape(bucket.height, target.line_size)
            rows[:, : bucket.width] = np.asarray(plane)
        rgb = self._planar_to_rgb.reformat(small, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1)
        return rgb.to_ndarray()
