"""Training and sampling of every family of models, end to end, with small fakes in place of the encoders."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputError
from tests.train.fake_encoders import use_fake_encoders
from tests.train.small_models import small_model
from train.diffusion.objective import create_objective
from train.diffusion.samplers import create_sampler
from train.model import create_model
from train.model.published import write_published
from train.sample import sample_videos
from train.sampling.config import SampleConfig
from train.sampling.files import file_stem
from train.sampling.latents import ClipSize, Head, sample_latents
from train.trainer import train


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch):
    use_fake_encoders(monkeypatch)


def train_small(ranks, small_config, model: str, **options):
    settings = ("depth=1", "hidden_size=32", "num_heads=2")
    train(small_config.changed(model=model, model_settings=settings, steps=2, **options), ranks)
    return small_config.output


def pixels(folder, prompt="x") -> np.ndarray:
    with Image.open(folder / f"{file_stem(prompt, 0)}.png") as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("model", "options", "sampler"),
    [
        ("dit-ti/2", {}, "dpm++"),
        ("dit-ti/2", {"objective": "rectified-flow", "flow_times": "uniform"}, "euler"),
        ("stdit-ti/2", {"min_snr_gamma": 5.0}, "ddim"),
        ("stdit3-ti/2", {"objective": "iddpm", "mask_ratios": ("random=1",)}, "ancestral"),
    ],
)
def test_every_family_is_trained_with_an_objective_and_sampled(ranks, small_config, tmp_path, model, options, sampler):
    run = train_small(ranks, small_config, model, **options)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert ("vb" in lines[0]) == (sampler != "euler")
    config = SampleConfig(run=run, prompt=("x",), output=tmp_path / "out", steps=2, sampler=sampler, formats=("png",))
    assert sample_videos(config) == 0
    assert pixels(config.output).shape == (32, 64, 3)


def test_stdit3_learns_to_go_on_from_given_frames_and_does(ranks, small_config, tmp_path):
    run = train_small(ranks, small_config, "stdit3-ti/2", mask_ratios=("image_head=0.5", "interpolate=0.5"))
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(tmp_path / "first.png")
    config = SampleConfig(
        run=run,
        prompt=("x",),
        output=tmp_path / "out",
        condition=tmp_path / "first.png",
        steps=3,
        formats=("png",),
    )
    sample_videos(config)
    made = pixels(config.output)
    assert np.array_equal(made[:, :32], blocks.repeat(8, 0).repeat(8, 1))
    assert not np.array_equal(made[:, 32:], made[:, :32])
    with pytest.raises(InputError, match="they make 2 of the clip's 2 latent frames"):
        sample_videos(dataclasses.replace(config, condition=tmp_path / "first.png", condition_frames=2))
    with pytest.raises(InputError, match="sampler 'ddim': the model was trained for rectified-flow: use euler"):
        sample_videos(dataclasses.replace(config, sampler="ddim"))


def test_a_run_without_frame_masks_is_said_not_to_know_given_frames(ranks, small_config, tmp_path, capsys):
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "first.png")
    for name, ratios in (("plain", ()), ("masked", ("image_head=0.5",))):
        config = small_config.changed(output=tmp_path / name)
        run = train_small(ranks, config, "stdit3-ti/2", mask_ratios=ratios)
        asked = SampleConfig(
            run=run, prompt=("x",), output=tmp_path, condition=tmp_path / "first.png", steps=1, formats=("png",)
        )
        assert sample_videos(asked) == 0
        assert ("--condition: the run was trained without --mask-ratios" in capsys.readouterr().err) == (not ratios)


def test_masks_change_what_is_learnt_and_not_which_samples_are(ranks, small_config):
    lines = []
    for name, ratios in (("plain", ()), ("masked", ("random=0.8",))):
        config = small_config.changed(output=small_config.output / name)
        run = train_small(ranks, config, "stdit3-ti/2", mask_ratios=ratios)
        lines.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert lines[0][0]["loss"] != lines[1][0]["loss"]
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=0.2)  # both are about 2, a new model's


SIZE = ClipSize(latent=(3, 4, 4), height=32, width=32, fps=24.0)


def sampled(model, size=SIZE, *, guidance=2.0, head=None):
    sampler = create_sampler(None, 2, create_objective(None, model="stdit3-ti/2", spatial_stride=8))
    caption = torch.full((3, 16), 0.5)
    return sample_latents(model, sampler, [caption], size, prompts=["p"], seed=0, guidance=guidance, head=head)[0]


@pytest.mark.parametrize("kind", ["stdit-ti/2", "stdit3-ti/2", "dit-ti/2"])
@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm++", "euler"])
def test_clips_that_are_sampled_together_are_those_of_each_prompt_alone(kind, name):
    model = small_model(kind).eval()
    objective = create_objective("rectified-flow" if name == "euler" else "iddpm", model=kind, spatial_stride=8)
    sampler = create_sampler(name, 3, objective)
    size = SIZE if kind != "dit-ti/2" else dataclasses.replace(SIZE, latent=(1, 4, 4))
    captions = [torch.full((length, 16), length / 9) for length in (3, 9, 1)]
    options = {"seed": 5, "guidance": 2.0}
    if kind == "stdit3-ti/2":
        options["head"] = Head(latents=torch.full((4, 1, 4, 4), 0.5))
    together = sample_latents(model, sampler, captions, size, prompts=["a", "b", "c"], **options)
    for prompt, caption, found in zip("abc", captions, together, strict=True):
        (alone,) = sample_latents(model, sampler, [caption], size, prompts=[prompt], **options)
        assert (found - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert not torch.allclose(together[0], together[1])


def test_stdit3_is_told_rate_and_size_and_which_frames_are_given():
    model = small_model("stdit3-ti/2").eval()
    first = sampled(model)
    assert torch.equal(first, sampled(model))
    for change in ({"fps": 8.0}, {"height": 64, "width": 64}):
        assert not torch.allclose(first, sampled(model, dataclasses.replace(SIZE, **change))), change
    latents = torch.full((4, 1, 4, 4), 0.5)
    led = sampled(model, head=Head(latents=latents))
    assert torch.equal(led[:, :1], latents)
    assert not torch.allclose(led[:, 1:], first[:, 1:])
    assert torch.equal(led, sampled(model, head=Head(latents=latents)))
    masks = []
    model.register_forward_pre_hook(lambda _, args, named: masks.append(named["x_mask"]), with_kwargs=True)
    sampled(model, head=Head(latents=latents))
    assert len(masks) == 2
    assert all(mask.tolist() == [[False, True, True]] * 2 for mask in masks)


def test_published_weights_are_sampled_with_the_encoders_of_a_cache(small_cache, tmp_path):
    common = {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 10}
    settings = tuple(f"{name}={common[name]}" for name in ("hidden_size", "depth", "num_heads"))
    torch.manual_seed(0)
    v1, v3 = create_model("stdit-xl/2", **common), create_model("stdit3-xl/2", **common)
    write_published(tmp_path / "v1.pth", v1.config, v1.state_dict())
    write_published(tmp_path / "v3", v3.config, v3.state_dict())
    config = SampleConfig(
        checkpoint=tmp_path / "v1.pth",
        cache=small_cache.url,
        model="stdit-xl/2",
        model_settings=(*settings, "space_scale=0.5"),
        prompt=("x",),
        output=tmp_path / "out-v1",
        steps=2,
        formats=("png",),
    )
    sample_videos(config)
    assert pixels(config.output).shape == (32, 64, 3)
    folder = dataclasses.replace(
        config, checkpoint=tmp_path / "v3", model=None, model_settings=(), output=tmp_path / "out-v3", sampler="euler"
    )
    sample_videos(folder)
    assert pixels(folder.output).shape == (32, 64, 3)
    for changes, message in [
        ({"model": None}, "v1.pth: a file does not say whose weights it holds: give --model, e.g. stdit-xl/2"),
        ({"model": "dit-xl/2"}, "v1.pth: weights of another model than this DiT: not in the model: "),
        (
            {"model": "dit-xl/2", "model_settings": ("num_classes=5",)},
            "num_classes=5: a model of labels has no prompts",
        ),
        ({"checkpoint": tmp_path / "v2.pth"}, "v2.pth: no such file or folder"),
        ({"model_settings": (*settings, "in_channels=8")}, "it is for latents of 4 channels, the model for 8"),
    ]:
        with pytest.raises(InputError, match=message):
            sample_videos(dataclasses.replace(config, **changes))
