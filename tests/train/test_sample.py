"""Sampling from a run, with small fakes in place of the encoders."""

import dataclasses
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputError
from shared.spec import Bucket
from tests.train.fake_encoders import FakeAutoencoder, use_fake_encoders
from train.diffusion.objective import create_objective
from train.diffusion.samplers import create_sampler
from train.model import create_model
from train.run_folder import RUN_FILE
from train.sample import sample_videos
from train.sampling.batch_size import MOST, forward_bytes, most_clips, usual_batch
from train.sampling.config import SampleConfig
from train.sampling.files import file_stem, grid_stem, write_grid
from train.sampling.latents import ClipSize, sample_latents
from train.sampling.prompts import read_prompts
from train.sampling.sources import open_source
from train.trainer import train


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch):
    use_fake_encoders(monkeypatch)


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


def test_prompts_sampled_together_give_what_each_gives_alone(run, tmp_path):
    prompts = ("a", "three words here", "two words", "b")
    config = SampleConfig(run=run, prompt=prompts, output=tmp_path / "alone", steps=2, formats=("png",), batch_size=1)
    assert sample_videos(config) == 0
    assert sample_videos(dataclasses.replace(config, output=tmp_path / "three", batch_size=3)) == 0
    assert sample_videos(dataclasses.replace(config, output=tmp_path / "all", batch_size=None)) == 0
    for stem in (file_stem(prompt, 0) for prompt in prompts):
        alone, *others = (np.asarray(Image.open(tmp_path / n / f"{stem}.png")) for n in ("alone", "three", "all"))
        for other in others:
            assert np.abs(other.astype(int) - alone).max() <= 1, stem


def test_the_same_seed_gives_the_same_bytes_and_formats_are_chosen(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff# of the week\n\n  a cat \nein \U0001f40b\n", encoding="utf-8")
    config = SampleConfig(
        run=run, prompts=prompts, prompt=("a dog",), output=tmp_path / "a", steps=2, formats=("png", "grid")
    )
    sample_videos(config)
    sample_videos(dataclasses.replace(config, output=tmp_path / "b"))
    sample_videos(dataclasses.replace(config, output=tmp_path / "c", seed=1))
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    all_prompts = ["a dog", "a cat", "ein \U0001f40b"]
    stems, together = [file_stem(prompt, 0) for prompt in all_prompts], grid_stem(all_prompts, 0)
    assert set(first) == {f"{stem}.png" for stem in (*stems, together)}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert not set(first.values()) & {path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with Image.open(tmp_path / "a" / f"{together}.png") as grid:
        assert grid.size == (64, 96)
        rows = np.asarray(grid).reshape(3, 32, 64, 3)
    for row, stem in zip(rows, stems, strict=True):
        with Image.open(tmp_path / "a" / f"{stem}.png") as image:
            assert np.array_equal(row, np.asarray(image))


def test_an_image_is_one_png_and_decoding_goes_in_slices(run, tmp_path):
    config = SampleConfig(run=run, prompt=("x",), output=tmp_path / "out", steps=1, num_frames=1)
    sample_videos(config)
    assert [path.name for path in config.output.iterdir()] == [file_stem("x", 0) + ".png"]
    clip = dataclasses.replace(config, num_frames=7, formats=("png",), output=tmp_path / "slices", decode_frames=3)
    sample_videos(clip)
    assert FakeAutoencoder.decoded == [3, 3, 1]
    sample_videos(dataclasses.replace(clip, output=tmp_path / "whole", decode_frames=None))
    assert FakeAutoencoder.decoded == [7]
    files = [next((tmp_path / name).iterdir()).read_bytes() for name in ("slices", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "no --prompt: give one or more, or a file"),
        ({"run": None}, "whose weights\\? give --run RUN, or --checkpoint FILE_OR_FOLDER and --cache CACHE"),
        ({"model": "stdit-xl/2"}, "model=stdit-xl/2 is for published weights: a run knows its own"),
        ({"condition_frames": 3}, "condition_frames=3 does nothing without --condition"),
        ({"decode_frames": 0}, "decode_frames=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"fps": 0.0}, "fps=0.0: expected more than 0"),
        ({"sampler": "euler"}, "sampler 'euler': the model was trained for iddpm: use ancestral or ddim or dpm"),
        ({"steps": 1001}, "1001 sampling steps: expected 1 to 1000"),
        ({"condition": Path("x.png")}, "--condition: stdit-ti/2 cannot be told which frames are given"),
        ({"prompts": Path("/nowhere/p.txt")}, "/nowhere/p.txt: cannot be read .No such file or directory.: expected"),
        ({"checkpoint": Path("/nowhere")}, "/nowhere/ema.safetensors: no such file"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line_before_anything_is_loaded(run, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("shared.encoders.t5.TextEncoder", None)
    with pytest.raises(InputError, match=message):
        sample_videos(SampleConfig(**({"run": run, "prompt": ("x",), "output": tmp_path / "out"} | changes)))
    assert not (tmp_path / "out").exists()


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("# nothing\n\n")
    with pytest.raises(InputError, match="p.txt: found no prompt: expected one a line"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="p.txt: expected a UTF-8 text file"):
        read_prompts(tmp_path / "p.txt")


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
    sample_videos(dataclasses.replace(config, height=40, seed=1))  # 5 latent rows: more than two patches, not three
    with av.open(str(config.output / f"{file_stem('x', 1)}.mp4")) as container:
        assert next(container.decode(video=0)).height == 40


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
    with pytest.raises(InputError, match=r"ema.safetensors: no such file.*or --weights plain"):
        sample_videos(config)
    assert sample_videos(dataclasses.replace(config, weights="plain")) == 0
    with pytest.raises(InputError, match=r"found no run.json"):
        sample_videos(dataclasses.replace(config, run=tmp_path))


def sampled(model, *, prompt="p", **options):
    caption = torch.full((3, 8), 0.5)
    sampler = create_sampler(None, 4, create_objective("iddpm", model="stdit-ti/2", spatial_stride=8))
    size = ClipSize(latent=(1, 4, 4), height=32, width=32, fps=8.0)
    given = {"seed": 0, "guidance": 3.0, **options}
    return sample_latents(model, sampler, [caption], size, prompts=[prompt], **given)[0]


def test_as_many_clips_are_sampled_at_once_as_the_memory_holds():
    model = create_model("stdit-ti/2", hidden_size=32, depth=2, num_heads=2, caption_channels=8, model_max_length=4)
    size, caption = ClipSize(latent=(4, 8, 8), height=64, width=64, fps=8.0), (4, 8)
    needed = [forward_bytes(model.to("meta"), size, caption, n, guidance=7.0) for n in (1, 2, 3)]
    assert needed[2] - needed[1] == pytest.approx(needed[1] - needed[0], rel=0.05)
    assert needed[0] > 1.8 * forward_bytes(model, size, caption, 1, guidance=1.0)
    for room, expected in ((0, 1), (needed[0] + 1, 1), (needed[1] + 1, 2), (needed[2] * 1.01, 3), (1e12, MOST)):
        assert most_clips(model, size, caption, room=room, guidance=7.0) == expected, room
    assert usual_batch(model, size, caption, torch.device("cpu"), guidance=7.0) == MOST


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


def test_clips_have_the_size_and_the_rate_of_clips_though_images_are_more(run):
    def source(*names):
        buckets = {Bucket.parse(name): (samples, fps) for name, samples, fps in names}
        return dataclasses.replace(open_source(SampleConfig(run=run, prompt=("x",), output=run)), buckets=buckets)

    joint = source(("1x64x64", 90, 120.0), ("16x32x32", 5, 24.0), ("8x32x32", 9, 12.0))
    assert joint.usual_bucket == Bucket(8, 32, 32)
    assert [joint.rate(Bucket(frames, 32, 32)) for frames in (8, 16, 4, 1)] == [12.0, 24.0, 12.0, 120.0]
    images = source(("1x64x64", 90, 120.0))
    assert images.usual_bucket == Bucket(1, 64, 64)
    with pytest.raises(InputError, match="8x64x64: only images are known here, so no rate is: give --fps"):
        images.rate(Bucket(8, 64, 64))


def test_a_folder_that_cannot_be_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=f"{tmp_path}/file: file exists while writing x.png"):
        write_grid([np.zeros((2, 2, 3), np.uint8)], tmp_path / "file", "x")
