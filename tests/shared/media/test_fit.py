"""Frames come out of the fitter as each would by itself, however many are resized at once."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from shared.media.fit import FrameFitter
from shared.spec import Bucket


def _frames(clips_folder: Path, name: str, count: int) -> list[av.VideoFrame]:
    with av.open(str(clips_folder / name)) as container:
        return [frame for frame, _ in zip(container.decode(video=0), range(count), strict=False)]


def _fitted(frames: Sequence[av.VideoFrame], bucket: Bucket) -> dict[int, np.ndarray]:
    fitter = FrameFitter(bucket, 1.0)
    ready = [pair for number, frame in enumerate(frames) for pair in fitter.add(number, frame)]
    return dict([*ready, *fitter.rest()])


@pytest.mark.parametrize("name", ["towers_teal.mp4", "bird_portrait.mp4", "towers_night.webm"])
@pytest.mark.parametrize("size", ["1x64x96", "1x160x160", "1x33x17", "1x240x240"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
def test_frames_that_are_resized_together_are_what_each_is_alone(
    clips_folder: Path, name: str, size: str, count: int
) -> None:
    bucket = Bucket.parse(size)
    frames = _frames(clips_folder, name, count)
    together = _fitted(frames, bucket)
    assert sorted(together) == list(range(count))
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(together[number], _fitted([frame], bucket)[0])


def test_frames_of_other_sizes_and_colours_between_them_stay_apart(clips_folder: Path) -> None:
    large, small = (_frames(clips_folder, name, 4) for name in ("towers_teal.mp4", "rabbit_sound.mp4"))
    mixed = [frame for pair in zip(large, small, strict=True) for frame in pair] + large[:3]
    full = _frames(clips_folder, "towers_teal.mp4", 2)[1]
    full.color_range = ColorRange.JPEG
    mixed.append(full)
    bucket = Bucket(1, 64, 96)
    fitted = _fitted(mixed, bucket)
    assert len(fitted) == len(mixed)
    for number, frame in enumerate(mixed):
        np.testing.assert_array_equal(fitted[number], _fitted([frame], bucket)[0])
    assert not np.array_equal(fitted[len(mixed) - 1], fitted[2])


@pytest.mark.parametrize("size", ["1x64x96", "1x240x240"])
@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG, ColorRange.UNSPECIFIED])
def test_frames_as_the_gpu_stores_them_give_the_same_pixels(
    clips_folder: Path, size: str, color_range: ColorRange
) -> None:
    """Chroma interleaved (NV12), in place of a plane for each."""
    bucket = Bucket.parse(size)
    (frame,) = _frames(clips_folder, "towers_teal.mp4", 1)
    frame.color_range = color_range
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    )
    chroma = np.stack([blue, red], axis=-1).reshape(len(blue), -1)
    stored = av.VideoFrame.from_ndarray(np.concatenate([luma, chroma]), format="nv12")
    stored.color_range, stored.colorspace = color_range, frame.colorspace
    np.testing.assert_array_equal(_fitted([stored], bucket)[0], _fitted([frame], bucket)[0])
