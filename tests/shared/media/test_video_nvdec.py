"""Decoding on the GPU gives the frames that the CPU gives."""

from pathlib import Path

import pytest

from shared.media.clip import Window, centre_window
from shared.media.container import open_container, video_stream
from shared.media.nvdec import nvdec_takes
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.video import decode_window
from shared.spec import Bucket
from tests.shared.media.made_clips import grey, media_of, write_clip

ON_GPU = {"towers_teal.mp4", "rabbit_sound.mp4", "bird_portrait.mp4", "towers_night.webm", "meadow.mpg"}
"""H.264, HEVC, VP9 and MPEG-2; AV1 is dav1d's."""


def test_what_nvdec_does_not_decode_is_left_to_the_cpu(clips_folder: Path, tmp_path: Path) -> None:
    judged = clips_folder.parent / "video"
    small = write_clip(tmp_path / "small.mp4", [grey(0)] * 2)
    deep = write_clip(tmp_path / "deep.mp4", [grey(0, 160, 160)] * 2, pix_fmt="yuv420p10le")
    taken = {}
    for path in (*(clips_folder / name for name in (*ON_GPU, "cloud_square.mkv")), judged / "prores.mov", small, deep):
        with open_container(media_of(path)) as container:
            taken[path.name] = nvdec_takes(video_stream(container, media_of(path)))
    assert {name for name, is_taken in taken.items() if is_taken} == ON_GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted({*ON_GPU, "cloud_square.mkv"}))
@pytest.mark.parametrize("size", ["5x256x256", "5x64x96"])
def test_the_gpu_decodes_the_frames_that_the_cpu_decodes(clips_folder: Path, name: str, size: str) -> None:
    media, bucket = media_of(clips_folder / name), Bucket.parse(size)
    (facts,) = probe(media)
    windows = [centre_window(facts.num_frames, num_frames=5, interval=2), Window(start=1, num_frames=5, fps=7)]
    for window in windows:
        on_cpu = decode_window(media, None, window, bucket)
        on_gpu = decode_window(media, None, window, bucket, device="nvdec")
        assert psnr(on_gpu, on_cpu) > 45
