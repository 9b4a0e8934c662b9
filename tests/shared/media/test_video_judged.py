"""Colours, depth, range, pixel aspect and orientation, as the ffmpeg program shows them.

``tests/data/video`` holds clips and what ffmpeg makes of them; ``make_clips.py`` there wrote both. FFmpeg converts
subsampled chroma in a hurry: 8 bits come out up to 1.5 levels too dark, 10 bits 2. Frames that keep their size and 8
bits are converted likewise, bit for bit; others are converted exactly, hence the bounds.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shared.media.clip import Window
from shared.media.fit import covering_box
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.video import decode_window
from shared.spec import Bucket
from tests.shared.media.made_clips import decoded, media_of, write_clip

FOLDER = Path(__file__).parents[2] / "data" / "video"
EXPECTED: dict[str, np.ndarray] = dict(np.load(FOLDER / "expected.npz"))
LEAST_PSNR = {
    "h264_10_bit.mp4": 38.0, "hevc_pq.mp4": 38.0, "hevc_hlg.mp4": 38.0, "prores.mov": 41.0, "anamorphic.mp4": 38.0,
    "h264_interlaced.mp4": 32.0,
}  # fmt: skip
"""In dB; the others are equal. ffmpeg takes the chroma of interlaced video field by field."""
_UNSPECIFIED = 2
"""A clip that does not name its colour matrix; it is BT.601 then."""
FOURTH = Window(start=3, num_frames=1)


def resized(picture: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Returns a picture (H, W, 3) as a bucket's frame, computed in float32."""
    box = covering_box(picture.shape[0], picture.shape[1], bucket)
    bands = [Image.fromarray(picture[..., band].astype(np.float32)) for band in range(3)]
    size = (bucket.width, bucket.height)
    small = np.dstack([np.asarray(band.resize(size, Image.Resampling.BICUBIC, box=box)) for band in bands])
    return np.clip(small + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_frame_is_what_ffmpeg_shows(name: str) -> None:
    expected = EXPECTED[name]
    media = media_of(FOLDER / name)
    (facts,) = probe(media)
    assert (facts.num_frames, facts.height, facts.width, facts.fps) == (7, *expected.shape[:2], 25)
    frame = decode_window(media, None, FOURTH, Bucket(1, facts.height, facts.width))[0]
    assert psnr(frame, expected) >= LEAST_PSNR.get(name, float("inf"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.parametrize("size", ["1x64x64", "1x36x48", "1x32x32"])
def test_a_resized_frame_is_what_ffmpeg_shows_resized(name: str, size: str) -> None:
    bucket = Bucket.parse(size)
    frame = decode_window(media_of(FOLDER / name), None, FOURTH, bucket)[0]
    assert psnr(frame, resized(EXPECTED[name], bucket)) > (36 if name == "h264_interlaced.mp4" else 39)


def test_resizing_by_planes_is_near_resizing_in_floating_point(clips_folder: Path) -> None:
    """Above 45 dB against float32, chroma and all, where it shrinks to half and less."""
    path = clips_folder / "towers_teal.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    planes = [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].astype(np.float32)
        for plane in frame.planes
    ]
    luma, blue, red = (plane.repeat(360 // len(plane), 0).repeat(360 // len(plane), 1) for plane in planes)
    assert frame.colorspace == _UNSPECIFIED
    bright, cb, cr = (luma - 16) * 255 / 219, (blue - 128) * 255 / 224, (red - 128) * 255 / 224
    rgb = np.dstack([bright + 1.402 * cr, bright - 0.34414 * cb - 0.71414 * cr, bright + 1.772 * cb])
    for bucket in (Bucket(1, 160, 160), Bucket(1, 64, 96)):
        shrunk = decoded(path, Window(start=0, num_frames=1), str(bucket))[0]
        assert psnr(shrunk, resized(np.clip(rgb, 0, 255), bucket)) > 45


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize(("hflip", "vflip"), [(False, False), (True, False), (False, True)])
def test_a_clip_is_turned_and_mirrored_as_its_display_matrix_says(
    tmp_path: Path, degrees: int, hflip: bool, vflip: bool
) -> None:
    """FFmpeg's turn is counter-clockwise, and the mirrors come after it."""
    stored = np.zeros((64, 96, 3), np.uint8)
    stored[:32, :48] = 200
    stored[:32, 48:] = 100
    stored[32:, :48] = 50
    path = write_clip(
        tmp_path / "turned.mp4",
        [stored] * 3,
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip),
    )
    shown = np.rot90(stored, k=degrees // 90)[:: -1 if vflip else 1, :: -1 if hflip else 1]
    (facts,) = probe(media_of(path))
    assert (facts.height, facts.width) == shown.shape[:2]
    if not (hflip or vflip):
        assert facts.rotation == (360 - degrees) % 360
    for divisor in (1, 2):
        bucket = Bucket(1, facts.height // divisor, facts.width // divisor)
        frame = decode_window(media_of(path), None, Window(start=1, num_frames=1), bucket)[0]
        np.testing.assert_allclose(frame[8:-8:16, 8:-8:16], resized(shown, bucket)[8:-8:16, 8:-8:16], atol=4)


@pytest.mark.parametrize(("aspect", "width"), [("4/3", 128), ("8/11", 70), ("0/1", 96), ("1000/1", 96)])
def test_pixels_are_made_square(tmp_path: Path, aspect: str, width: int) -> None:
    """A shape that is round on the screen is round in the frame; a nonsensical aspect says nothing."""
    shown = (np.hypot(*np.mgrid[-32:32, -width / 2 : width / 2]) < 28) * np.uint8(255)
    stored = np.asarray(Image.fromarray(shown).resize((96, 64), Image.Resampling.BICUBIC))
    path = write_clip(
        tmp_path / "odd.mkv",
        [np.dstack([stored] * 3)] * 2,
        prepare=lambda stream: _set_aspect(stream, Fraction(aspect)),
    )
    (facts,) = probe(media_of(path))
    assert (facts.height, facts.width) == (64, width)
    frame = decoded(path, Window(start=0, num_frames=1), "1x64x64")[0][..., 0] > 127
    assert abs(int(frame.any(0).sum()) - int(frame.any(1).sum())) <= 2


def _set_aspect(stream: av.video.stream.VideoStream, aspect: Fraction) -> None:
    stream.codec_context.sample_aspect_ratio = aspect
