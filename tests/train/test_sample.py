"""Sampling from a run, with small fakes in place of the encoders."""

import dataclasses
import json
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputError
from tests.train.synthetic_cache import TEXT_CHANNELS, provenance
from train.diffusion import iddpm
from train.model import create_model
from train.run_folder import RUN_FILE
from train.sample import SampleConfig, sample_latent, sample_videos
from train.trainer import train
from train.video_files import file_stem


class FakeTextEncoder:
    """One token a word, its embedding from the word's length."""

    @classmethod
    def load(cls, model, **_options):
        return cls()

    def provenance(self):
        return provenance()["text.t5"]

    def encode(self, captions):
        return [torch.stack([torch.full((TEXT_CHANNELS,), len(w) / 5) for w in c.split()]) for c in captions]


class FakeAutoencoder:
    """Enlarges the first three latent channels eight times."""

    @classmethod
    def load(cls, model, **_options):
        return cls()

    def provenance(self):
        return provenance()["latent"]

    def decode(self, latent):
        pixels = latent[:3].permute(1, 2, 3, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu().numpy()


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch):
    monkeypatch.setattr("shared.encoders.t5.TextEncoder", FakeTextEncoder)
    monkeypatch.setattr("shared.encoders.vae.VideoAutoencoder", FakeAutoencoder)


@pytest.fixture
def run(ranks, small_config):
    train(dataclasses.replace(small_config, steps=2), ranks)
    return small_config.output


def test_a_prompt_becomes_files_that_play(run, tmp_path):
    prompts = ("A red Ball, ../rolling/ ", "ein \U0001f40b")
    config = SampleConfig(run=run, prompt=prompts, output=tmp_path / "out", steps=3, seed=4)
    assert sample_videos(config) == 0
    names = sorted(path.name for path in config.output.iterdir())
    assert names == sorted(file_stem(p, 4) + suffix for p in prompts for suffix in (".gif", ".mp4", ".png"))
    stem = config.output / file_stem(prompts[0], 4)
    assert stem.name.startswith("a-red-ball-rolling-")
    with av.open(str(stem) + ".mp4") as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
    assert np.stack(frames).shape == (2, 32, 32, 3)  # the most common bucket
    with Image.open(str(stem) + ".gif") as gif:
        assert (gif.n_frames, gif.size) == (2, (32, 32))
    with Image.open(str(stem) + ".png") as strip:
        assert strip.size == (64, 32)


def test_other_prompts_and_other_seeds_have_other_files():
    long = "a " * 100
    stems = {file_stem(p, s) for p in ("a b", "a-b", "A b", long, long + "b", "\U0001f40b", "/") for s in (0, 1)}
    assert len(stems) == 14
    assert all(re.fullmatch(r"[a-z0-9-]{1,80}", stem) for stem in stems)


def test_another_size_is_made_and_one_that_does_not_fit_is_refused(run, tmp_path):
    config = SampleConfig(run=run, prompt=("x",), output=tmp_path / "out", steps=1, num_frames=5, width=64)
    sample_videos(config)
    with av.open(str(config.output / f"{file_stem('x', 0)}.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (5, 32, 64, 3)
    with pytest.raises(InputError, match="height=36 is not divisible"):
        sample_videos(dataclasses.replace(config, height=36))
    with pytest.raises(InputError, match="not divisible by the patch"):
        sample_videos(dataclasses.replace(config, height=40))


@pytest.mark.parametrize("stream", ["latent", "text.t5"])
def test_encoders_with_other_weights_than_the_cache_are_refused(run, tmp_path, stream):
    description = json.loads((run / RUN_FILE).read_text())
    description["provenance"][stream]["weights_sha256"] = "those of yesterday"
    (run / RUN_FILE).write_text(json.dumps(description))
    config = SampleConfig(run=run, prompt=("x",), output=tmp_path / "out", steps=1)
    with pytest.raises(InputError, match=r"weights_sha256=those of yesterday, the model found has \w+ weights"):
        sample_videos(config)
    assert not config.output.exists()


def test_without_checkpoint_or_average_one_line_says_so(run, tmp_path):
    config = SampleConfig(run=run, prompt=("x",), output=tmp_path / "out", steps=1)
    (run / "checkpoints" / "step-00000002" / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema.safetensors: no such file.*or --no-ema"):
        sample_videos(config)
    assert sample_videos(dataclasses.replace(config, ema=False)) == 0
    with pytest.raises(InputError, match=r"found no run.json"):
        sample_videos(dataclasses.replace(config, run=tmp_path))


def sampled(model, **options):
    caption = torch.full((3, 8), 0.5)
    schedule = iddpm.respace(iddpm.linear_schedule(), 4)
    given = {"prompt": "p", "seed": 0, "guidance": 3.0, **options}
    return sample_latent(model, schedule, caption, (1, 4, 4), **given)


def test_noise_depends_on_prompt_and_seed_and_guidance_uses_the_null_caption():
    torch.manual_seed(0)
    model = create_model("stdit-ti/2", hidden_size=32, depth=1, num_heads=2, caption_channels=8, model_max_length=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first = sampled(model)
    assert torch.equal(first, sampled(model))
    for change in ({"prompt": "q"}, {"seed": 1}, {"guidance": 1.0}, {"guidance_channels": 3}):
        assert not torch.equal(first, sampled(model, **change)), change
    model.y_embedder.y_embedding.fill_(0.5)  # the null caption is now the caption: guidance changes nothing
    torch.testing.assert_close(sampled(model), sampled(model, guidance=1.0), atol=1e-4, rtol=1e-4)
