"""The encoders give what plain transformers and diffusers give, on models of the real classes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from shared.encoders.location import locate
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder, read_geometry
from shared.errors import InputError
from shared.spec import VaeGeometry

CAPTIONS = ["a dog runs over a meadow", "A CAT", "a dog runs over a meadow", "two birds", "rain " * 200]


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    return TextEncoder.load("demo:t5")


@pytest.fixture(scope="module")
def vae() -> VideoAutoencoder:
    return VideoAutoencoder.load("demo:vae", micro_batch=3)


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8)


def test_embeddings_are_those_of_plain_transformers_with_padding_cut_off(text_encoder: TextEncoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate("demo:t5"))
    model = T5EncoderModel.from_pretrained(locate("demo:t5"), dtype=torch.float32).eval()
    cleaned = [text_encoder.clean(caption) for caption in CAPTIONS]
    batch = tokenizer(cleaned, padding="max_length", truncation=True, max_length=120, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    found = text_encoder.encode(CAPTIONS)
    assert [len(embedding) for embedding in found] == lengths
    assert lengths[-1] == 120
    for embedding, reference, length in zip(found, expected, lengths, strict=True):
        torch.testing.assert_close(embedding, reference[:length], atol=1e-5, rtol=1e-5)


def test_an_embedding_does_not_depend_on_its_neighbours(text_encoder: TextEncoder) -> None:
    together = text_encoder.encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, together, strict=True):
        torch.testing.assert_close(text_encoder.encode([caption])[0], embedding, atol=1e-6, rtol=1e-6)


def test_latents_are_those_of_plain_diffusers(vae: VideoAutoencoder, frames: np.ndarray) -> None:
    model = AutoencoderKL.from_pretrained(locate("demo:vae")).float().eval()
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        posterior = model.encode(pixels).latent_dist
        samples = torch.stack([vae.encode(frames, seed=str(seed)) for seed in range(64)])  # (64, C, T, H, W)
    assert samples.shape[1:] == (16, 5, 4, 6)
    mean = posterior.mean.transpose(0, 1) * model.config.scaling_factor
    std = posterior.std.transpose(0, 1) * model.config.scaling_factor
    deviation = (samples - mean) / std
    assert deviation.mean().abs() < 0.02
    assert abs(deviation.std() - 1) < 0.02


def test_posterior_noise_is_named_by_its_seed(vae: VideoAutoencoder, frames: np.ndarray) -> None:
    assert torch.equal(vae.encode(frames, seed="a"), vae.encode(frames, seed="a"))
    assert not torch.equal(vae.encode(frames, seed="a"), vae.encode(frames, seed="b"))


def test_mean_and_logarithm_of_the_variance_give_the_sample_with_its_noise(
    vae: VideoAutoencoder, frames: np.ndarray
) -> None:
    sample = vae.encode(frames, seed="x")
    mean = VideoAutoencoder.load("demo:vae", micro_batch=3, posterior="mean")
    both = VideoAutoencoder.load("demo:vae", micro_batch=3, posterior="mean+logvar")
    assert mean.provenance() == vae.provenance() | {"posterior": "mean"}
    stored = both.encode(frames, seed="any")
    assert stored.shape == (2 * sample.shape[0], *sample.shape[1:])
    middle, logvar = stored.chunk(2)
    torch.testing.assert_close(middle, mean.encode(frames, seed="other"))
    noise = (sample - middle) / torch.exp(logvar / 2)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_the_micro_batch_changes_latents_by_rounding_only(vae: VideoAutoencoder, frames: np.ndarray) -> None:
    whole = VideoAutoencoder.load("demo:vae", micro_batch=5).encode(frames, seed="a")
    torch.testing.assert_close(vae.encode(frames, seed="a"), whole, atol=1e-4, rtol=1e-4)


def test_decoding_undoes_the_normalisation(vae: VideoAutoencoder) -> None:
    model = AutoencoderKL.from_pretrained(locate("demo:vae")).float().eval()
    z = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.decode(z).sample.clamp(-1, 1).add(1).mul(127.5).permute(0, 2, 3, 1)
    found = vae.decode((z * model.config.scaling_factor).transpose(0, 1))
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(float), expected.numpy(), atol=0.51)


def test_the_geometry_is_known_without_weights(vae: VideoAutoencoder) -> None:
    assert read_geometry("demo:vae") == vae.geometry == VaeGeometry(latent_channels=16, spatial_stride=8)


def test_the_hash_names_the_weights_and_not_their_file_or_precision(tmp_path: Path, vae: VideoAutoencoder) -> None:
    ours = vae.provenance()["weights_sha256"]
    model = AutoencoderKL.from_pretrained(locate("demo:vae")).float()
    model.save_pretrained(tmp_path / "copy")
    copy = VideoAutoencoder.load(str(tmp_path / "copy"), dtype=torch.bfloat16)
    assert copy.provenance()["weights_sha256"] == ours
    assert copy.provenance()["precision"] == "bfloat16"
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert VideoAutoencoder.load(str(tmp_path / "other")).provenance()["weights_sha256"] != ours


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "one-word"])
def test_a_model_that_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(InputError, match="model 'demo:clip': expected demo:t5 or demo:vae"):
        locate("demo:clip")
    with pytest.raises(InputError, match="no such folder: expected a folder or a hub id"):
        VideoAutoencoder.load(model)
    with pytest.raises(InputError, match="no such folder: expected a folder or a hub id"):
        TextEncoder.load(model)


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_noise(tmp_path: Path) -> None:
    for model, name, load in [
        ("demo:t5", "model.safetensors", TextEncoder.load),
        ("demo:vae", "diffusion_pytorch_model.safetensors", VideoAutoencoder.load),
    ]:
        folder = shutil.copytree(locate(model), tmp_path / model.removeprefix("demo:"))
        weights = load_file(folder / name)
        lacking = sorted(weights)[-1]
        save_file({key: value for key, value in weights.items() if key != lacking}, folder / name, {"format": "pt"})
        with pytest.raises(InputError, match=r"\d weights? missing or of another shape"):
            load(str(folder))
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
        with pytest.raises(InputError, match="not loadable"):
            load(str(folder))


def test_a_folder_that_holds_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="VAE .*expected"):
        VideoAutoencoder.load(locate("demo:t5"))
    with pytest.raises(InputError, match="VAE .*no configuration found"):
        VideoAutoencoder.load(str(tmp_path))
    with pytest.raises(InputError, match="text encoder .*not loadable"):
        TextEncoder.load(str(tmp_path))
