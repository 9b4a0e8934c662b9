"""Decoding on the GPU gives the frames that the CPU gives."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputError
from shared.media import nvdec as nvdec_module
from shared.media import video
from shared.media.clip import Media, Window, centre_window
from shared.media.container import open_container, video_stream
from shared.media.nvdec import nvdec, nvdec_takes
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.refusal import MediaError
from shared.media.video import Device, decode_window
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
    with pytest.raises(InputError, match="expected a CUDA device and its video driver: use the device cpu"):
        decode_window(media, None, Window(start=0, num_frames=1), Bucket(1, 64, 64), device="nvdec")


def test_a_codec_that_nvdec_does_not_know_at_all_comes_from_the_cpu(
    clips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "nvdec", nvdec_module._accelerator)  # which tells that without a GPU
    on_gpu, on_cpu = _both(
        media_of(clips_folder / "cloud_square.mkv"), Window(start=1, num_frames=5), Bucket(5, 64, 64)
    )
    np.testing.assert_array_equal(on_gpu, on_cpu)


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process without torch: one that uses CUDA by torch cannot have the decoder."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def _both(media: Media, window: Window, bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    return (
        decode_window(media, None, window, bucket, device="nvdec"),
        decode_window(media, None, window, bucket, device="cpu"),
    )


def _first_format(media: Media) -> str | None:
    """Returns the format in which NVDEC gives a clip's first frame; None if it is not NVDEC that would decode it."""
    try:
        with open_container(media, hwaccel=nvdec()) as container:
            stream = video_stream(container, media)
            if not nvdec_takes(stream):
                return None
            frame = next(container.decode(stream))
            return frame.format.name if stream.codec_context.is_hwaccel else None
    except MediaError as error:
        assert "no stream is compatible" in error.detail
        return None


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*ON_GPU, "cloud_square.mkv"}))
def test_nvdec_itself_decodes_and_not_the_cpu_behind_it(
    apart: ProcessPoolExecutor, clips_folder: Path, name: str
) -> None:
    found = apart.submit(_first_format, media_of(clips_folder / name)).result()
    assert found == ("nv12" if name in ON_GPU else None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*ON_GPU, "cloud_square.mkv"}))
@pytest.mark.parametrize("size", ["5x256x256", "5x64x96"])
def test_the_gpu_decodes_the_frames_that_the_cpu_decodes(
    apart: ProcessPoolExecutor, clips_folder: Path, name: str, size: str
) -> None:
    media, bucket = media_of(clips_folder / name), Bucket.parse(size)
    (facts,) = probe(media)
    windows = [centre_window(facts.num_frames, num_frames=5, interval=2), Window(start=1, num_frames=5, fps=7)]
    for window in windows:
        on_gpu, on_cpu = apart.submit(_both, media, window, bucket).result()
        if name in ON_GPU - EXACT:
            assert psnr(on_gpu, on_cpu) > 45
        else:
            np.testing.assert_array_equal(on_gpu, on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "yuv422p"])
def test_formats_that_nvdec_lacks_come_from_the_cpu(apart: ProcessPoolExecutor, tmp_path: Path, pix_fmt: str) -> None:
    path = write_clip(tmp_path / "odd.mkv", [grey(number, 160, 192) for number in range(8)], pix_fmt=pix_fmt)
    on_gpu, on_cpu = apart.submit(_both, media_of(path), Window(start=2, num_frames=5), Bucket(5, 64, 64)).result()
    np.testing.assert_array_equal(on_gpu, on_cpu)


def _outcomes(media: Media) -> list[str]:
    """Returns what becomes of a clip's window on each device: its shape, or the reason of a refusal."""
    found = []
    devices: tuple[Device, ...] = ("nvdec", "cpu")
    for device in devices:
        try:
            frames = decode_window(media, None, Window(start=2, num_frames=8), Bucket(8, 64, 64), device=device)
            found.append(str(frames.shape))
        except MediaError as error:
            found.append(error.reason)
    return found


@pytest.mark.gpu
def test_damage_leads_to_what_the_cpu_finds_but_inside_a_frame_where_nvdec_conceals_it(
    apart: ProcessPoolExecutor, clips_folder: Path, tmp_path: Path
) -> None:
    content = (clips_folder / "towers_teal.mp4").read_bytes()
    found = {}
    for place in range(len(content) // 9, len(content), len(content) // 9):
        path = tmp_path / f"damaged-{place}.mp4"
        path.write_bytes(content[: place // 2] if place % 2 else content[:place] + bytes(64) + content[place + 64 :])
        found[place] = apart.submit(_outcomes, media_of(path)).result()
    differing = {(on_gpu, on_cpu) for on_gpu, on_cpu in found.values() if on_gpu != on_cpu}
    assert differing <= {("(8, 64, 64, 3)", "frames_missing")}, found
    assert len({on_cpu for _, on_cpu in found.values()}) >= 3, found


def _differing(path: str) -> int:
    """Returns how many values of a clip's windows differ between the devices."""
    media, bucket = Media(url=path), Bucket(5, 128, 128)
    windows = [Window(start=start, num_frames=5) for start in range(0, 20, 4)]
    return sum(int((on_gpu != on_cpu).sum()) for on_gpu, on_cpu in (_both(media, window, bucket) for window in windows))


@pytest.mark.gpu
def test_many_processes_decode_on_one_gpu_at_once(clips_folder: Path) -> None:
    paths = [str((clips_folder / name).absolute()) for name in sorted(EXACT)] * (2 * MANY // len(EXACT))
    with ProcessPoolExecutor(MANY, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_differing, paths)) == [0] * len(paths)
