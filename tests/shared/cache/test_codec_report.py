"""What codecs cost and lose, as it is reported."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.cache.codec_report import ReportConfig, Videos, load_arrays, main, measure, table
from shared.cache.payload import encode
from shared.codec import Codec
from shared.errors import InputError
from tests.shared.cache.taef2 import Taef2, read_clip

ROOT = Path(__file__).parents[3]
TAEF2 = Path(__file__).parents[4] / "shared/data/taef2"
REAL_CLIPS = [
    Path(__file__).parents[4] / "shared/data/clips" / name
    for name in ("suv-in-the-dust.mp4", "hiker.mp4", "crush-027.mp4")
]
needs_taef2 = pytest.mark.skipif(
    not all(path.exists() for path in (TAEF2, *REAL_CLIPS)),
    reason=f"needs the autoencoder {TAEF2} and the clips beside it, which are not part of the repository",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def latent() -> torch.Tensor:
    return torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randn(30, 64, generator=torch.Generator().manual_seed(0))


def test_a_row_says_the_bits_and_the_noise_of_its_codec(latent: torch.Tensor) -> None:
    exact, coarse = measure([latent, latent[:, :3]], [Codec.parse("float32"), Codec.parse("int8@30+zstd")])
    assert exact.bits_per_value == 32
    assert exact.sqnr_db == exact.worst_channel_sqnr_db == math.inf
    num_bytes = sum(len(encode(array, coarse.codec)) for array in (latent, latent[:, :3]))
    assert coarse.bits_per_value == 8 * num_bytes / (11 * 4 * 256)
    assert coarse.sqnr_db == pytest.approx(30, abs=0.5)
    assert 29 < coarse.worst_channel_sqnr_db < coarse.sqnr_db
    assert coarse.worst_token_cosine is None
    assert min(coarse.encode_mb_per_second, coarse.decode_mb_per_second) > 0


def test_signal_is_what_varies_in_a_channel(latent: torch.Tensor) -> None:
    (near,), (far,) = (measure([latent + shift], [Codec.parse("bfloat16")]) for shift in (0, 100))
    assert far.sqnr_db < near.sqnr_db - 20


def test_channels_that_do_not_vary_and_arrays_of_nothing_do_not_count(latent: torch.Tensor) -> None:
    still = torch.cat([latent, torch.full((1, 8, 16, 16), 0.1)])
    (row,) = measure([still, latent[:, :0]], [Codec.parse("int8@30")])
    assert row.worst_channel_sqnr_db > 29


def test_the_cosine_is_that_of_the_worst_token(text: torch.Tensor) -> None:
    text[7] *= 0.01
    (row,) = measure([text], [Codec.parse("int8@30")])
    assert row.worst_token_cosine is not None
    assert row.worst_token_cosine < 0.5


def test_the_video_is_compared_with_that_of_the_uncompressed_latent(latent: torch.Tensor) -> None:
    def decode(values: torch.Tensor) -> np.ndarray:
        return (values.float() * 20 + 128).clamp(0, 255).round().byte().numpy()

    clip = decode(latent + 0.1 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(1)))
    codecs = [Codec.parse(name) for name in ("float32", "int8@30", "int8@10")]
    exact, fine, coarse = measure([latent], codecs, videos=Videos(decode=decode, clips=[clip]))
    assert exact.worst_psnr_change_db == 0
    assert fine.worst_psnr_change_db is not None
    assert coarse.worst_psnr_change_db is not None
    assert coarse.worst_psnr_change_db < -3 < fine.worst_psnr_change_db < 0


def test_nothing_to_measure_on_is_an_error(latent: torch.Tensor) -> None:
    with pytest.raises(InputError, match="not one value"):
        measure([latent[:, :0]], [Codec.parse("float32")])
    with pytest.raises(InputError, match="give --latents FILE"):
        main(ReportConfig())


def test_tables_have_the_columns_that_apply(latent: torch.Tensor, text: torch.Tensor) -> None:
    latents = table(measure([latent], [Codec.parse("bfloat16+zstd"), Codec.parse("float32")]))
    texts = table(measure([text], [Codec.parse("int8@30+zstd")]))
    assert "cosine" not in latents
    assert "exact" in latents.splitlines()[3]
    assert "worst token's cosine" in texts
    assert "video" not in texts
    assert texts.splitlines()[2].startswith("| `int8@30+zstd` | ")


def test_tensors_of_several_samples_are_taken_apart(tmp_path: Path, text: torch.Tensor) -> None:
    save_file({"one": text, "two": torch.stack([text, text])}, tmp_path / "texts.safetensors")
    assert [tuple(array.shape) for array in load_arrays([tmp_path / "texts.safetensors"], 2)] == [(30, 64)] * 3
    with pytest.raises(InputError, match=r"is torch.float32 of shape \(30, 64\), expected floats of 4 axes, or 5"):
        load_arrays([tmp_path / "texts.safetensors"], 4)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_holds_no_tensors_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "broken.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="broken.safetensors: .*expected a safetensors file"):
        load_arrays([file], 4)


def test_the_command_prints_a_table_of_each(tmp_path: Path, latent: torch.Tensor, text: torch.Tensor) -> None:
    save_file({"latent": latent}, tmp_path / "latents.safetensors")
    save_file({"text": text}, tmp_path / "texts.safetensors")
    command = [sys.executable, "-m", "shared.cache.codec_report", "--latents", str(tmp_path / "latents.safetensors")]
    command += ["--texts", str(tmp_path / "texts.safetensors"), "--latent-codecs", "bfloat16+zstd int8@37+delta+zstd"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("| codec |") == 2
    assert "| `int8@37+delta+zstd` |" in done.stdout
    wrong = subprocess.run([*command, "--text-codecs", "int8"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
@needs_taef2
def test_real_clips_keep_their_quality_at_five_bits() -> None:
    network = Taef2(TAEF2)
    clips = [read_clip(path) for path in REAL_CLIPS]
    latents = [network.encode(clip) for clip in clips]
    videos = Videos(decode=network.decode, clips=clips)
    (row,) = measure(latents, [Codec.parse("int8@38+delta+zstd")], videos=videos)
    assert row.bits_per_value < 5.4
    assert row.sqnr_db > 37
    assert row.worst_psnr_change_db is not None
    assert row.worst_psnr_change_db > -0.05
    lossless, different = measure(latents, [Codec.parse("bfloat16+zstd"), Codec.parse("bfloat16+delta+zstd")])
    assert lossless.bits_per_value < 10.6
    assert different.bits_per_value < 10.2
    assert lossless.sqnr_db == different.sqnr_db == math.inf
    (image,) = measure([latent[:, :1] for latent in latents], [Codec.parse("int8@37+delta+zstd")])
    assert image.bits_per_value < 6.5
