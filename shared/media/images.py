"""Images, and pictures that move (GIF, animated PNG and WebP), read by Pillow."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from shared.media.clip import Media
from shared.media.container import check_size, refusal
from shared.media.orientation import Orientation, exif_orientation
from shared.media.refusal import MediaError
from shared.media.timeline import Timeline

_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_TICK = Fraction(1, 1000)
_USUAL_MILLISECONDS = 100
"""How long browsers show a frame whose duration is 0 or unknown."""
_STILL_MILLISECONDS = 1000


def is_image(beginning: bytes) -> bool:
    """Returns whether a file that begins so (16 bytes) is an image."""
    return beginning.startswith(_BEGINNINGS) or (beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP")


@contextmanager
def open_image(media: Media, file: BinaryIO) -> Iterator[Image.Image]:
    """Opens an image in a file that is open; its pixels are not read yet.

    Raises:
        MediaError: if it is damaged or too large; also if reading it fails while it is open.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as image:
                check_size(media, image.width, image.height)
                yield image
        except MediaError:
            raise
        except Image.DecompressionBombError:
            raise MediaError("too_large", f"{media}: an image of more pixels than we take") from None
        except Exception as error:  # Pillow's readers raise whatever their parsing of a damaged file trips over.
            raise refusal(media, error, "not_decodable") from None


def image_timeline(image: Image.Image) -> Timeline:
    """Returns when an image's frames are shown, in milliseconds; a still one is a frame of a second."""
    if num_frames(image) == 1:
        return Timeline(times=[0], end=_STILL_MILLISECONDS, tick=_TICK)
    times, now = [], 0
    for number in range(num_frames(image)):
        image.seek(number)
        image.load()
        times.append(now)
        now += max(round(image.info.get("duration") or _USUAL_MILLISECONDS), 1)
    return Timeline(times=times, end=now, tick=_TICK)


def num_frames(image: Image.Image) -> int:
    """Returns how many frames an image has; what phones put behind a JPEG are other images."""
    return 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))


def image_orientation(image: Image.Image) -> Orientation:
    """Returns how an image is to be turned, by its EXIF tag."""
    value = image.getexif().get(ExifTags.Base.Orientation)
    return exif_orientation(value if isinstance(value, int) else 1)


def image_pixels(image: Image.Image, number: int) -> np.ndarray:
    """Returns a frame (H, W, 3), uint8, RGB, as stored; what is transparent shows white."""
    if num_frames(image) > 1:
        image.seek(number)
    if image.mode.startswith("I"):
        deep = np.asarray(image, np.float32) / 257
        return np.repeat(np.clip(deep + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"))
    return np.asarray(image.convert("RGB"))
