"""Every family of autoencoders gives what plain diffusers gives, with its published normalisation.

The models are small and random, of the real classes, saved and loaded as a published one is.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)
from torch import Tensor

from shared.encoders.vae import VideoAutoencoder, read_geometry
from shared.encoders.vae_families import with_defaults
from shared.encoders.vae_geometry import geometry_by, geometry_on_disk
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape

MEANS, DEVIATIONS = [0.1, -0.2, 0.3, 0.05], [1.5, 2.0, 0.7, 3.0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A small model of one class, and how it was published that its latents are normalised."""

    build: Callable[[], Any]
    formula: Callable[[Any, Tensor], Tensor]
    """Of a latent (1, C, T, H, W)."""
    geometry: VaeGeometry
    num_frames: int = 9
    is_image: bool = False


def _ltx() -> AutoencoderKLLTXVideo:
    model = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.5,
    )
    model.latents_mean.copy_(torch.tensor(MEANS))
    model.latents_std.copy_(torch.tensor(DEVIATIONS))
    return model


_DOWN_UP = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
_PLAIN = {"encoder_block_types": "ResBlock", "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}

CASES = {
    "sdxl": Case(
        build=lambda: AutoencoderKL(
            block_out_channels=(8, 16, 16), norm_num_groups=4, scaling_factor=0.13, shift_factor=0.4, **_DOWN_UP
        ),
        formula=lambda model, z: (z - 0.4) * 0.13,
        geometry=VaeGeometry(latent_channels=4, spatial_stride=4),
        is_image=True,
    ),
    "dc-ae": Case(
        build=lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41,
            **_PLAIN,
        ),
        formula=lambda model, z: z * 0.41,
        geometry=VaeGeometry(latent_channels=4, spatial_stride=4),
        is_image=True,
    ),
    "cogvideox": Case(
        build=lambda: AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.7,
            invert_scale_latents=True,  # of the image that conditions CogVideoX 1.5, not of clips
        ),
        formula=lambda model, z: z * 0.7,
        geometry=VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4),
        num_frames=17,
    ),
    "wan": Case(
        build=lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=MEANS, latents_std=DEVIATIONS
        ),
        formula=lambda model, z: (
            (z - torch.tensor(MEANS).view(-1, 1, 1, 1)) / torch.tensor(DEVIATIONS).view(-1, 1, 1, 1)
        ),
        geometry=VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4),
    ),
    "hunyuanvideo": Case(
        build=lambda: AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        formula=lambda model, z: z * 0.476986,
        geometry=VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4),
        num_frames=21,
    ),
    "ltx": Case(
        build=_ltx,
        formula=lambda model, z: (
            (z - torch.tensor(MEANS).view(-1, 1, 1, 1)) * 0.5 / torch.tensor(DEVIATIONS).view(-1, 1, 1, 1)
        ),
        geometry=VaeGeometry(latent_channels=4, spatial_stride=32, temporal_stride=8),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, str]:
    """A case, its model, and the folder in which it is saved."""
    case = CASES[request.param]
    torch.manual_seed(0)
    model = case.build().eval().requires_grad_(False)
    if isinstance(model, AutoencoderKLHunyuanVideo):
        model.use_framewise_encoding = False  # whole: diffusers would blend pieces of clips of over 16 frames
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return case, model, str(folder)


def clip(case: Case, seed: int = 0) -> np.ndarray:
    """Returns random frames."""
    side = 2 * case.geometry.spatial_stride
    return np.random.default_rng(seed).integers(0, 256, (case.num_frames, side, 2 * side, 3), np.uint8)


def moments(case: Case, model: Any, frames: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Returns mean and log-variance of plain diffusers, (1, C, T, H, W) each."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # (1, 3, T, h, w)
    if not case.is_image:
        posterior = model.encode(pixels).latent_dist
        return posterior.mode(), posterior.logvar
    out = model.encode(pixels[0].transpose(0, 1))
    if not hasattr(out, "latent_dist"):
        return out.latent.transpose(0, 1)[None], None
    return out.latent_dist.mode().transpose(0, 1)[None], out.latent_dist.logvar.transpose(0, 1)[None]


@torch.inference_mode()
def test_the_stored_mean_is_that_of_diffusers_in_the_published_normalisation(saved: tuple[Case, Any, str]) -> None:
    case, model, folder = saved
    frames = clip(case)
    found = VideoAutoencoder.load(folder, posterior="mean").encode(frames, seed="a")
    mean, _ = moments(case, model, frames)
    assert found.shape == latent_shape(Bucket(*frames.shape[:3]), case.geometry)
    torch.testing.assert_close(found, case.formula(model, mean)[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_stored_sample_is_that_of_the_posterior_with_the_noise_that_the_seed_names(
    saved: tuple[Case, Any, str],
) -> None:
    case, model, folder = saved
    frames = clip(case)
    mean, logvar = moments(case, model, frames)
    if logvar is None:
        for posterior in ("sample", "mean+logvar"):
            with pytest.raises(InputError, match="is deterministic, .*: use --posterior mean"):
                VideoAutoencoder.load(folder, posterior=posterior)
        return
    vae = VideoAutoencoder.load(folder)
    both = VideoAutoencoder.load(folder, posterior="mean+logvar").encode(frames, seed="a")
    samples = torch.stack([vae.encode(frames, seed=str(seed)) for seed in range(8)])
    first = case.formula(model, mean + torch.exp(logvar / 2))[0] - case.formula(model, mean)[0]  # one deviation
    noise = (samples - case.formula(model, mean)[0]) / first
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    torch.testing.assert_close(both[:4], case.formula(model, mean)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.exp(both[4:] / 2), first, atol=1e-5, rtol=1e-4)


def test_the_geometry_is_read_from_the_configuration_alone(saved: tuple[Case, Any, str]) -> None:
    case, _, folder = saved
    assert read_geometry(folder) == geometry_on_disk(folder) == case.geometry
    for weights in Path(folder).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".away"))
    try:
        assert read_geometry(folder) == case.geometry
        assert geometry_on_disk(folder) == case.geometry
        with pytest.raises(InputError, match="not loadable"):
            VideoAutoencoder.load(folder, posterior="mean")
    finally:
        for weights in Path(folder).glob("*.away"):
            weights.rename(weights.with_suffix(".safetensors"))


def test_where_a_configuration_is_silent_the_geometry_is_that_of_the_class(tmp_path: Path) -> None:
    for model_class in (
        *(AutoencoderDC, AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo),
        AutoencoderKLWan,
    ):
        name = model_class.__name__
        expected = geometry_by(name)(with_defaults(model_class, {}))
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        assert geometry_on_disk(str(tmp_path)) == expected, name
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AnotherAutoencoder"}))
    assert geometry_on_disk(str(tmp_path)) is None
    assert geometry_on_disk(str(tmp_path / "nowhere")) is None


def test_many_clips_are_encoded_as_each_alone_bit_for_bit(saved: tuple[Case, Any, str]) -> None:
    case, _, folder = saved
    vae = VideoAutoencoder.load(folder, posterior="mean", micro_batch=4)
    clips = [(str(seed), clip(case, seed)) for seed in range(3)]
    found = list(vae.encode_each(iter(clips)))
    assert [seed for seed, _ in found] == ["0", "1", "2"]
    for (seed, frames), (_, latent) in zip(clips, found, strict=True):
        assert torch.equal(vae.encode(frames, seed=seed), latent)


@torch.inference_mode()
def test_decoding_gives_the_frames_of_diffusers(saved: tuple[Case, Any, str]) -> None:
    case, model, folder = saved
    frames = clip(case)
    vae = VideoAutoencoder.load(folder, posterior="mean")
    mean, _ = moments(case, model, frames)
    found = vae.decode(vae.encode(frames, seed="a"))
    assert (found.shape, found.dtype) == (frames.shape, np.uint8)
    if case.is_image:
        pixels = model.decode(mean[0].transpose(0, 1)).sample
    else:
        pixels = model.decode(mean).sample[0].transpose(0, 1)
    expected = (pixels.clamp(-1, 1) + 1) * 127.5
    np.testing.assert_allclose(found.astype(float), expected.permute(0, 2, 3, 1).numpy(), atol=0.52)


def test_frames_that_do_not_suit_are_refused_with_those_that_would(saved: tuple[Case, Any, str]) -> None:
    case, _, folder = saved
    vae = VideoAutoencoder.load(folder, posterior="mean")
    stride, frames = case.geometry.temporal_stride, clip(case)
    if stride > 1:
        with pytest.raises(InputError, match=rf"{stride} frames do not suit .* use 1 or {stride + 1}"):
            vae.encode(frames[:stride], seed="a")
    with pytest.raises(InputError, match="height=.* is not divisible by the VAE's spatial stride"):
        vae.encode(frames[:, 1:], seed="a")


def test_provenance_names_class_and_normalisation(saved: tuple[Case, Any, str]) -> None:
    case, model, folder = saved
    made = VideoAutoencoder.load(folder, posterior="mean").provenance()
    assert made["model_class"] == type(model).__name__
    assert (made["spatial_stride"], made["temporal_stride"]) == (
        case.geometry.spatial_stride,
        case.geometry.temporal_stride,
    )
    assert set(made) == {
        *("model", "model_class", "weights_sha256", "precision", "latent_channels", "spatial_stride"),
        *("temporal_stride", "scaling_factor", "shift_factor", "posterior", "micro_batch"),
    }
    z = torch.randn(1, 4, 2, 3, 3)
    shift, scale = (torch.as_tensor(made[key]).reshape(-1, 1, 1, 1) for key in ("shift_factor", "scaling_factor"))
    torch.testing.assert_close((z - shift) * scale, case.formula(model, z))


def test_a_bin_file_is_read_without_running_what_is_pickled_in_it(tmp_path: Path) -> None:
    model = CASES["sdxl"].build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert VideoAutoencoder.load(str(tmp_path)).provenance()["weights_sha256"]
    (weights,) = tmp_path.glob("*.bin")
    torch.save({"conv": _Attack(tmp_path / "ran")}, weights)
    with pytest.raises(InputError, match="not loadable"):
        VideoAutoencoder.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


class _Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_class_that_is_not_supported_is_refused_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(InputError, match="class AutoencoderTiny: expected one of AutoencoderKL, .*AutoencoderKLWan"):
        VideoAutoencoder.load(str(tmp_path))
