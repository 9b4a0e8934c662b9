"""Open-Sora's autoencoder loads by the published names and gives what the published code gives."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.encoders.opensora_vae import SCALE, SHIFT, TEMPORAL_CONFIG, OpenSoraVae
from shared.encoders.vae import VideoAutoencoder, read_geometry
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.sampling.encoders import decode_latent

SPATIAL = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TEMPORAL = {"filters": 8, "num_groups": 4}
CONFIG = {
    "architectures": ["VideoAutoencoderPipeline"],
    "model_type": "VideoAutoencoderPipeline",
    "micro_frame_size": 17,
    "shift": SHIFT,
    "scale": SCALE,
    "vae_2d": {"type": "VideoAutoencoderKL", "config": SPATIAL},
    "vae_temporal": {"type": "VAE_Temporal_SD", **TEMPORAL},
}
PUBLISHED_LATENT = [
    [-0.0083286, -0.1026069, -0.1798322, -0.3084660, 0.3803583, -0.0622845, 0.3051011],
    [-0.0886614, 0.0653341, 0.1423900, 0.0251196, 0.3821752, -0.0228350, 0.9227734],
    [-0.0271320, -0.1862406, -0.5326750, -0.6619518, -0.1030668, -0.0582470, -0.7337690],
    [-0.0848988, -0.0633862, -0.3283191, -0.2580863, -0.4064268, -0.0612969, -0.3479939],
]
"""What Open-Sora's own code (v1.2) gives of 22 frames with the weights below, at row 1 and column 2."""
PUBLISHED_PIXELS = [[2.46, 85.78, 0.0, 85.76], [121.93, 107.44, 71.26, 75.20], [150.07, 166.51, 90.34, 117.86]]
"""And of that latent decoded: red, green and blue of every seventh frame at row 5 and column 9."""


def _weight(name: str, like: Tensor) -> Tensor:
    """Returns numbers that depend on nothing but a weight's name and shape."""
    if name in ("shift", "scale"):
        return like
    values = torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(like.shape, np.float32))
    if like.dim() > 1:
        return values / max(1, like[0].numel()) ** 0.5
    return values / 4 + name.endswith("weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model, saved as the published one is."""
    folder = tmp_path_factory.mktemp("opensora")
    model = OpenSoraVae(spatial=SPATIAL, temporal={**TEMPORAL_CONFIG, **TEMPORAL})
    weights = {name: _weight(name, tensor).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def _frames(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 32, 48, 3), np.uint8)


def test_latents_and_frames_are_those_of_the_published_code(folder: str) -> None:
    vae = VideoAutoencoder.load(folder, posterior="mean")
    latent = vae.encode(_frames(22), seed="a")
    assert latent.shape == (4, 7, 4, 6)
    np.testing.assert_allclose(latent[:, :, 1, 2], PUBLISHED_LATENT, atol=1e-5)
    frames = vae.decode(latent, num_frames=22)
    assert frames.shape == (22, 32, 48, 3)
    np.testing.assert_allclose(frames[::7, 5, 9].T, PUBLISHED_PIXELS, atol=0.51)


def test_a_model_of_full_size_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in OpenSoraVae().state_dict().items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 393_341_015
    assert shapes["scale"] == shapes["shift"] == (1, 4, 1, 1, 1)
    assert shapes["spatial_vae.module.encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["temporal_vae.encoder.conv_in.conv.weight"] == (128, 4, 3, 3, 3)
    assert shapes["temporal_vae.encoder.block_res_blocks.1.0.conv3.conv.weight"] == (256, 128, 1, 1, 1)
    assert shapes["temporal_vae.encoder.conv_blocks.2.conv.weight"] == (256, 256, 3, 3, 3)
    assert "temporal_vae.encoder.conv_blocks.0.conv.weight" not in shapes
    assert shapes["temporal_vae.quant_conv.conv.weight"] == (8, 8, 1, 1, 1)
    assert shapes["temporal_vae.decoder.conv_blocks.1.conv.bias"] == (512,)
    assert shapes["temporal_vae.decoder.conv_out.conv.weight"] == (4, 128, 3, 3, 3)


@pytest.mark.parametrize("num_frames", [1, 4, 16, 17, 18, 40])
def test_a_clip_is_encoded_in_chunks_of_17_frames_that_do_not_see_each_other(folder: str, num_frames: int) -> None:
    vae = VideoAutoencoder.load(folder, posterior="mean")
    frames = _frames(num_frames)
    latent = vae.encode(frames, seed="a")
    assert latent.shape == latent_shape(Bucket(num_frames, 32, 48), read_geometry(folder))
    parts = [vae.encode(frames[start : start + 17], seed="a") for start in range(0, num_frames, 17)]
    torch.testing.assert_close(latent, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
    assert vae.decode(latent, num_frames).shape == frames.shape


def test_a_clip_is_decoded_chunk_by_chunk_as_whole_and_not_in_tiles(folder: str) -> None:
    vae = VideoAutoencoder.load(folder, posterior="mean")
    latent = vae.encode(_frames(40), seed="a")
    whole = decode_latent(vae.decode, latent, vae.geometry, 40, decode_frames=51).astype(int)
    parts = decode_latent(vae.decode, latent, vae.geometry, 40, decode_frames=17).astype(int)
    assert whole.shape == parts.shape == (40, 32, 48, 3)
    assert np.abs(whole - parts).max() <= 1
    with pytest.raises(InputError, match="VAE .*: VideoAutoencoderPipeline does not decode in tiles"):
        vae.decode_in_tiles()


def test_provenance_names_shift_scale_and_chunks(folder: str) -> None:
    made = VideoAutoencoder.load(folder).provenance()
    np.testing.assert_allclose(made["shift_factor"], SHIFT, rtol=1e-6)
    np.testing.assert_allclose(made["scaling_factor"], 1 / np.array(SCALE), rtol=1e-6)
    assert json.loads(json.dumps(made)) == made
    geometry = VaeGeometry(latent_channels=4, spatial_stride=8, temporal_stride=4, chunk_frames=17)
    assert VaeGeometry.recorded(made) == read_geometry(folder) == geometry


def test_the_posterior_in_time_is_sampled_by_the_seed(folder: str) -> None:
    mean, both = (VideoAutoencoder.load(folder, posterior=each) for each in ("mean", "mean+logvar"))
    vae, frames = VideoAutoencoder.load(folder), _frames(18)
    assert torch.equal(vae.encode(frames, seed="a"), vae.encode(frames, seed="a"))
    middle, logvar = both.encode(frames, seed="a").chunk(2)
    assert torch.equal(middle, mean.encode(frames, seed="b"))
    noise = (torch.stack([vae.encode(frames, seed=str(seed)) for seed in range(8)]) - middle) / torch.exp(logvar / 2)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_frames_in_several_passes_and_clips_in_one_batch_change_latents_by_rounding_only(folder: str) -> None:
    whole = VideoAutoencoder.load(folder, micro_batch=64).encode(_frames(20), seed="a")
    parts = VideoAutoencoder.load(folder, micro_batch=3).encode(_frames(20), seed="a")
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_frames_that_the_memory_does_not_hold_go_through_in_smaller_passes(folder: str) -> None:
    vae = VideoAutoencoder.load(folder, micro_batch=16)
    expected = vae.encode(_frames(20), seed="a")
    images, sizes = vae._model.spatial_vae.module, []
    encode = images.encode

    def small_memory(pixels: Tensor) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    images.encode = small_memory
    found = vae.encode(_frames(20), seed="a")
    assert (sizes, vae.halved) == ([16, 8, 4, 4, 4, 4, 4], True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_lack_or_do_not_fit_are_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match="not loadable"):
        VideoAutoencoder.load(str(tmp_path))
    weights = load_file(Path(folder) / "model.safetensors")
    del weights["temporal_vae.quant_conv.conv.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 weight missing .* temporal_vae.quant_conv.conv.bias"):
        VideoAutoencoder.load(str(tmp_path))
