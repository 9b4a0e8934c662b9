"""Images are clips of one frame; pictures that move are clips."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from shared.media.clip import Window
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.refusal import MediaError
from shared.media.video import presentation_times
from tests.shared.media.made_clips import decoded, grey, media_of, numbers

ONE = Window(start=0, num_frames=1)


@pytest.fixture
def scene(clips_folder: Path) -> Image.Image:
    """A real picture, 480x360."""
    return Image.fromarray(decoded(clips_folder / "towers_teal.mp4", ONE, "1x360x480")[0])


@pytest.mark.parametrize(("ending", "least"), [("png", 99), ("jpg", 33), ("webp", 33), ("gif", 25)])
def test_an_image_is_a_clip_of_one_frame(scene: Image.Image, tmp_path: Path, ending: str, least: float) -> None:
    path = tmp_path / f"scene.{ending}"
    scene.save(path)
    (facts,) = probe(media_of(path))
    assert (facts.num_frames, facts.height, facts.width, facts.fps, facts.is_image) == (1, 360, 480, 1, True)
    assert facts.codec == {"jpg": "jpeg"}.get(ending, ending)
    assert presentation_times(media_of(path)) == [0]
    for window in (ONE, Window(start=0, num_frames=1, fps=24)):
        assert psnr(decoded(path, window, "1x360x480")[0], np.asarray(scene)) > least
    mirrored = decoded(path, Window(start=0, num_frames=1, flip=True), "1x360x480")[0]
    assert psnr(mirrored[:, ::-1], np.asarray(scene)) > least


@pytest.mark.parametrize("value", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(scene: Image.Image, tmp_path: Path, value: int) -> None:
    path = tmp_path / "scene.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    scene.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    (facts,) = probe(media_of(path))
    assert (facts.width, facts.height) == upright.size
    np.testing.assert_array_equal(decoded(path, ONE, f"1x{facts.height}x{facts.width}")[0], np.asarray(upright))


def _ramp() -> np.ndarray:
    return np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))


def _kinds() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Returns images of many modes, and the grey ramp (H, W) that each must show."""
    ramp = _ramp()
    alpha = np.full_like(ramp, 255)
    alpha[:32] = 0
    over_white = np.where(alpha == 0, 255, ramp).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([ramp, ramp, ramp, alpha]))
    return {
        "grey.png": (Image.fromarray(ramp), ramp),
        "deep.png": (Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        "bits.png": (Image.fromarray(ramp).convert("1", dither=Image.Dither.NONE), np.where(ramp > 127, 255, 0)),
        "palette.png": (Image.fromarray(ramp).convert("P"), ramp),
        "grey_and_alpha.png": (rgba.convert("LA"), over_white),
        "alpha.png": (rgba, over_white),
        "alpha.webp": (rgba, over_white),
        "cmyk.jpg": (Image.merge("CMYK", [Image.fromarray(band) for band in (*[255 - ramp] * 3, ramp * 0)]), ramp),
    }


@pytest.mark.parametrize("name", list(_kinds()))
def test_images_of_every_kind_become_rgb(tmp_path: Path, name: str) -> None:
    """What is transparent shows white."""
    image, shown = _kinds()[name]
    path = tmp_path / name
    image.save(path, quality=100, lossless=True)
    frame = decoded(path, ONE, "1x64x64")[0]
    np.testing.assert_allclose(frame.astype(int), np.repeat(shown[..., None], 3, axis=2), atol=2)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_a_picture_that_moves_is_a_clip(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"moving.{ending}"
    first, *others = [Image.fromarray(grey(number)) for number in range(6)]
    first.save(path, save_all=True, append_images=others, duration=[100, 100, 300, 100, 100, 300], lossless=True)
    (facts,) = probe(media_of(path))
    assert (facts.num_frames, facts.is_image, facts.duration, facts.fps) == (6, False, 1.0, 6)
    assert presentation_times(media_of(path)) == pytest.approx([0, 0.1, 0.2, 0.5, 0.6, 0.7])
    assert numbers(decoded(path, Window(start=1, num_frames=3, interval=2))) == [1, 3, 5]
    assert numbers(decoded(path, Window(start=0, num_frames=5, fps=5))) == [0, 2, 2, 4, 5]
    with pytest.raises(MediaError, match="probe_outdated"):
        decoded(path, Window(start=0, num_frames=7))


def test_what_a_phone_puts_behind_a_jpeg_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    first, second = Image.fromarray(grey(3)), Image.fromarray(grey(20, 32, 32))
    first.save(path, format="MPO", save_all=True, append_images=[second])
    (facts,) = probe(media_of(path))
    assert (facts.num_frames, facts.is_image, facts.codec) == (1, True, "jpeg")
    assert numbers(decoded(path, ONE)) == [3]


def test_a_truncated_image_is_refused(scene: Image.Image, tmp_path: Path) -> None:
    for ending in ("png", "jpg", "webp", "gif"):
        path = tmp_path / f"scene.{ending}"
        scene.save(path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(MediaError) as refused:
            probe(media_of(path))
        assert refused.value.reason == "not_decodable"
