"""The committed clips and the demo's models: what the demo and the other tests rely on."""

import csv
import math
from pathlib import Path

import av
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, T5EncoderModel

ROOT = Path(__file__).parents[3]
CLIPS = ROOT / "tests" / "data" / "clips"
DEMO = ROOT / "shared" / "encoders" / "demo"
SIDE = 256


def manifest() -> list[dict[str, str]]:
    with (CLIPS / "clips.csv").open(newline="") as file:
        return list(csv.DictReader(file))


VIDEOS = sorted({row["path"] for row in manifest()} - {"not_a_video.mp4"})


def decode(name: str) -> list[torch.Tensor]:
    """Frames of a clip, uint8 (C, H, W)."""
    with av.open(CLIPS / name) as container:
        return [torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1) for f in container.decode(video=0)]


def four_crops(name: str) -> torch.Tensor:
    """The middle of four frames in [-1, 1], (4, 3, 256, 256)."""
    frames = decode(name)
    x = torch.stack([frames[round(index * (len(frames) - 1) / 3)] for index in range(4)])
    top, left = ((length - SIDE) // 2 for length in x.shape[-2:])
    return x[..., top : top + SIDE, left : left + SIDE].float() / 127.5 - 1


def psnr(y: torch.Tensor, x: torch.Tensor) -> float:
    return 10 * math.log10(4 / (y.clamp(-1, 1) - x).square().mean().item())


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def crops() -> dict[str, torch.Tensor]:
    return {name: four_crops(name) for name in VIDEOS}


@pytest.fixture(scope="module")
def latents(vae: AutoencoderKL, crops: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return {name: vae.encode(x).latent_dist.mode() for name, x in crops.items()}


def test_every_file_of_the_manifest_exists_and_the_clips_stay_under_two_megabytes() -> None:
    assert all((CLIPS / row["path"]).is_file() and row["text"] for row in manifest())
    assert sum(path.stat().st_size for path in CLIPS.iterdir() if path.is_file()) < 2_000_000


def test_the_manifest_has_a_clip_with_two_captions() -> None:
    paths = [row["path"] for row in manifest()]
    assert len(VIDEOS) == 6
    assert len(paths) == len(VIDEOS) + 2


@pytest.mark.parametrize("name", VIDEOS)
def test_every_clip_fills_the_smallest_bucket_without_upscaling(name: str) -> None:
    frames = decode(name)
    assert len(frames) >= 17
    assert min(frames[0].shape[1:]) >= SIDE


def test_not_a_video_is_refused_by_the_decoder() -> None:
    with pytest.raises(av.error.InvalidDataError):
        decode("not_a_video.mp4")


def test_one_clip_is_portrait_and_one_has_sound() -> None:
    sizes, sounds = [], []
    for name in VIDEOS:
        with av.open(CLIPS / name) as container:
            sizes.append((container.streams.video[0].width, container.streams.video[0].height))
            sounds.append(len(container.streams.audio))
    assert sum(height > width for width, height in sizes) == 1
    assert sum(sounds) == 1
    assert len(set(sizes)) == len(sizes)


def test_the_autoencoder_is_small_and_of_stride_8_with_16_channels(
    vae: AutoencoderKL, latents: dict[str, torch.Tensor]
) -> None:
    assert (DEMO / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size < 4_000_000
    assert vae.config.latent_channels == 16
    assert all(z.shape == (4, 16, SIDE // 8, SIDE // 8) for z in latents.values())


def test_the_scaling_factor_brings_latents_to_about_unit_deviation(
    vae: AutoencoderKL, latents: dict[str, torch.Tensor]
) -> None:
    deviation = torch.cat(list(latents.values())).std().item() * vae.config.scaling_factor
    assert 0.5 < deviation < 2.0


def test_clips_that_the_autoencoder_never_saw_survive_it_even_in_bfloat16(
    vae: AutoencoderKL, crops: dict[str, torch.Tensor], latents: dict[str, torch.Tensor]
) -> None:
    with torch.inference_mode():
        measured = {name: psnr(vae.decode(z.bfloat16().float()).sample, crops[name]) for name, z in latents.items()}
    assert sum(measured.values()) / len(measured) >= 30.0, measured
    assert min(measured.values()) >= 25.0, measured
    notice = (DEMO / "NOTICE.md").read_text()
    for name, value in measured.items():
        recorded = float(notice.split(f"| `{name}` |")[1].split("|")[0])
        assert value == pytest.approx(recorded, abs=0.3), name


def test_the_posterior_is_narrow_but_not_a_point(vae: AutoencoderKL, crops: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        posterior = vae.encode(torch.cat([x[:1] for x in crops.values()])).latent_dist
    ratio = posterior.std.mean() / posterior.mean.std()
    assert 1e-4 < ratio < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_text_encoder_tells_captions_apart_in_every_dtype(dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "t5")
    model = T5EncoderModel.from_pretrained(DEMO / "t5", dtype=dtype).eval()
    captions = sorted({row["text"] for row in manifest()})
    with torch.inference_mode():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].float() for text in captions]
    assert all(torch.isfinite(h).all() and h.shape[1] == 32 for h in hidden)
    means = torch.nn.functional.normalize(torch.stack([h.mean(dim=0) for h in hidden]), dim=1)
    similarity = means @ means.T - torch.eye(len(captions))
    assert similarity.max() < 0.9


def test_the_tokenizer_splits_as_t5_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "t5")
    assert tokenizer("A cat sat on the mat.")["input_ids"] == [71, 1712, 3, 7, 144, 30, 8, 6928, 5, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 32_100)
