"""Decoding on the GPU gives the frames that the CPU gives."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputError
from shared.media.clip import Media, Window, centre_window
from shared.media.container import open_container, video_stream
from shared.media.nvdec import nvdec, nvdec_takes
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.refusal import MediaError
from shared.media.video import decode_window
from shared.spec import Bucket
from tests.shared.media.made_clips import grey, media_of, write_clip

EXACT = {"towers_teal.mp4", "rabbit_sound.mp4", "bird_portrait.mp4", "towers_night.webm"}
"""H.264, HEVC and VP9 of 8 bits: their standards say each bit of a frame."""
ON_GPU = {*EXACT, "meadow.mpg"}
"""MPEG-2 leaves rounding to the decoder; AV1 is dav1d's."""
MANY = 12
"""Processes that decode at once: more than the GPU has decoders."""


def test_what_nvdec_does_not_decode_is_left_to_the_cpu(clips_folder: Path, tmp_path: Path) -> None:
    judged = clips_folder.parent / "video"
    small = write_clip(tmp_path / "small.mp4", [grey(0)] * 2)
    deep = write_clip(tmp_path / "deep.mp4", [grey(0, 160, 160)] * 2, pix_fmt="yuv420p10le")
    fine = write_clip(tmp_path / "fine.mkv", [grey(0, 160, 160)] * 2, pix_fmt="yuv444p")
    taken = {}
    clips = (*(clips_folder / name for name in (*ON_GPU, "cloud_square.mkv")), judged / "prores.mov", small, deep, fine)
    for path in clips:
        with open_container(media_of(path)) as container:
            taken[path.name] = nvdec_takes(video_stream(container, media_of(path)))
    assert {name for name, is_taken in taken.items() if is_taken} == ON_GPU


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_nvdec_is_refused_in_one_line(clips_folder: Path) -> None:
    media = media_of(clips_folder / "towers_teal.mp4")
    with pytest.raises(InputError, match="expected a CUDA device: use the device cpu"):
        decode_window(media, None, Window(start=0, num_frames=1), Bucket(1, 64, 64), device="nvdec")


def _both(media: Media, window: Window, bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    return tuple(decode_window(media, None, window, bucket, device=device) for device in ("nvdec", "cpu"))  # type: ignore[return-value,arg-type]


def _is_on_gpu(media: Media) -> bool:
    with open_container(media, hwaccel=nvdec()) as container:
        stream = video_stream(container, media)
        return nvdec_takes(stream) and stream.codec_context.is_hwaccel


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*ON_GPU, "cloud_square.mkv"}))
@pytest.mark.parametrize("size", ["5x256x256", "5x64x96"])
def test_the_gpu_decodes_the_frames_that_the_cpu_decodes(clips_folder: Path, name: str, size: str) -> None:
    media, bucket = media_of(clips_folder / name), Bucket.parse(size)
    assert _is_on_gpu(media) == (name in ON_GPU)
    (facts,) = probe(media)
    windows = [centre_window(facts.num_frames, num_frames=5, interval=2), Window(start=1, num_frames=5, fps=7)]
    for window in windows:
        on_gpu, on_cpu = _both(media, window, bucket)
        if name in ON_GPU - EXACT:
            assert psnr(on_gpu, on_cpu) > 45
        else:
            np.testing.assert_array_equal(on_gpu, on_cpu)


@pytest.mark.gpu
def test_nvdec_itself_gives_the_frames_and_not_the_cpu_behind_it(clips_folder: Path) -> None:
    media = media_of(clips_folder / "towers_teal.mp4")
    with open_container(media, hwaccel=nvdec()) as container:
        stream = video_stream(container, media)
        frame = next(container.decode(stream))
        assert stream.codec_context.is_hwaccel
        assert frame.format.name == "nv12"


@pytest.mark.gpu
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "yuv422p"])
def test_formats_that_nvdec_lacks_come_from_the_cpu(tmp_path: Path, pix_fmt: str) -> None:
    path = write_clip(tmp_path / "odd.mkv", [grey(number, 160, 192) for number in range(8)], pix_fmt=pix_fmt)
    on_gpu, on_cpu = _both(media_of(path), Window(start=2, num_frames=5), Bucket(5, 64, 64))
    np.testing.assert_array_equal(on_gpu, on_cpu)


@pytest.mark.gpu
def test_a_damaged_clip_is_refused_for_the_reason_that_the_cpu_finds(clips_folder: Path, tmp_path: Path) -> None:
    content = (clips_folder / "towers_teal.mp4").read_bytes()
    outcomes = []
    for number, place in enumerate(range(len(content) // 5, len(content), len(content) // 5)):
        path = tmp_path / f"damaged-{number}.mp4"
        path.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
        by_device: list[str] = []
        for device in ("nvdec", "cpu"):
            try:
                window = Window(start=2, num_frames=8)
                frames = decode_window(media_of(path), None, window, Bucket(8, 64, 64), device=device)  # type: ignore[arg-type]
                by_device.append(f"{frames.shape}")
            except MediaError as error:
                by_device.append(error.reason)
        outcomes.append(by_device)
    assert all(on_gpu == on_cpu for on_gpu, on_cpu in outcomes), outcomes


def _differing(path: str) -> int:
    """Returns how many pixels of a clip's windows differ between the devices; runs in a process of its own."""
    media, bucket = Media(url=path), Bucket(5, 128, 128)
    windows = [Window(start=start, num_frames=5) for start in range(0, 20, 4)]
    return sum(int((on_gpu != on_cpu).sum()) for on_gpu, on_cpu in (_both(media, window, bucket) for window in windows))


@pytest.mark.gpu
def test_many_processes_decode_on_one_gpu_at_once(clips_folder: Path) -> None:
    paths = [str((clips_folder / name).absolute()) for name in sorted(EXACT)] * (2 * MANY // len(EXACT))
    with ProcessPoolExecutor(MANY, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_differing, paths)) == [0] * len(paths)
