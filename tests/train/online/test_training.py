"""Training from clips that are encoded meanwhile, against training from the cache that stage 1 makes of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from shared.errors import InputError
from tests.train.online.encoded_cache import encode_cache
from train.config import TrainConfig
from train.config.command_line import parse_command_line
from train.trainer import train

BUCKETS = ("4x64x64", "8x48x32")
STEPS = 8  # more than two epochs


@pytest.fixture(autouse=True)
def index_in_the_tests_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def online(small_config: TrainConfig, clips_folder: Path) -> TrainConfig:
    return small_config.changed(
        cache=None,
        online=str(clips_folder / "clips.csv"),
        buckets=BUCKETS,
        vae="demo:vae",
        text_encoder="demo:t5",
        latent_codec="float32",
        text_codec="float32",
        precision="float32",
        batch_size=2,
        steps=STEPS,
        num_workers=1,
    )


def losses(config: TrainConfig, ranks) -> list[float]:
    assert train(config, ranks) == 0
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines]


def cached(config: TrainConfig, folder: Path, latents: str, texts: str) -> TrainConfig:
    """Returns the same run from a cache of the same clips."""
    options = PreprocessConfig(
        preset="demo",
        manifest=str(config.encoding.online),
        output=str(folder / "cache"),
        buckets=BUCKETS,
        latent_codec=latents,
        text_codec=texts,
    )
    plain = dict.fromkeys(("online", "vae", "text_encoder")) | {"buckets": ()}
    codecs = dict.fromkeys(("latent_codec", "text_codec"), "bfloat16+zstd")
    cache = encode_cache(options, folder / "probes")
    return config.changed(cache=cache.url, output=folder / "run", **plain, **codecs)


def test_losses_are_those_of_training_from_a_cache_within_the_codecs_error(ranks, online, tmp_path):
    expected = losses(online, ranks)
    exact = losses(cached(online, tmp_path / "exact", "float32", "float32"), ranks)
    assert exact == pytest.approx(expected, rel=1e-5)
    half = losses(cached(online, tmp_path / "half", "bfloat16+zstd", "bfloat16+zstd"), ranks)
    assert half == pytest.approx(expected, rel=1e-4)
    assert half != exact
    small = losses(cached(online, tmp_path / "small", "int8@30+delta+zstd", "int8@20+zstd"), ranks)
    assert small == pytest.approx(expected, rel=5e-3)
    assert json.loads((online.output / "refused.jsonl").read_text())["reason"] == "not_a_video"


def test_a_run_that_is_ended_and_started_again_goes_on_with_the_same_losses(ranks, online):
    whole = losses(online, ranks)
    parts = online.changed(output=online.output.with_name("parts"), steps=3)
    losses(parts, ranks)
    assert losses(parts.changed(steps=STEPS), ranks) == whole
    described = json.loads((online.output / "run.json").read_text())
    assert described["provenance"]["latent"]["weights_sha256"]
    with pytest.raises(InputError, match="the run there has frame_interval=1 .*, this one has frame_interval=2"):
        train(parts.changed(frame_interval=2), ranks)


def test_a_source_is_asked_for_and_only_one(online, tmp_path):
    with pytest.raises(InputError, match="--cache and --online: found both"):
        online.changed(cache="somewhere")
    with pytest.raises(InputError, match="--cache and --online: found neither"):
        TrainConfig.of(output=tmp_path)
    with pytest.raises(InputError, match="num_workers=0 with --online"):
        online.changed(num_workers=0)
    with pytest.raises(InputError, match=r"local_cache_gb=5.0 does nothing with --online"):
        online.changed(local_cache=tmp_path, local_cache_gb=5.0)
    assert online.changed(local_cache=tmp_path).data.local_cache == tmp_path


def test_clips_that_cannot_be_read_are_said_to_be_in_the_ledger(ranks, online, tmp_path, capsys):
    for path in Path(str(online.encoding.online)).parent.iterdir():
        shutil.copy(path, tmp_path)
    cut = online.changed(online=str(tmp_path / "clips.csv"), on_corrupt="skip", steps=1)
    losses(cut, ranks)
    clip = tmp_path / "towers_teal.mp4"
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    losses(cut.changed(steps=5), ranks)
    ledger = f"{cut.output}/refused-rank*.jsonl"
    assert f" could not be read: the next good one was taken instead; see {ledger}" in capsys.readouterr().out
    assert list(cut.output.glob("refused-rank*.jsonl"))


def test_an_output_folder_of_somebody_else_is_left_alone_before_clips_are_probed(ranks, online):
    online.output.mkdir()
    (online.output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found files but no run.json"):
        train(online, ranks)
    assert [entry.name for entry in online.output.iterdir()] == ["thesis.txt"]


def test_a_runs_options_are_read_again_from_its_description(ranks, small_config, online):
    for config in (small_config.changed(steps=1), online.changed(steps=1)):
        config = config.changed(output=config.output.with_name(f"of {config.cache}".replace("/", "-")))
        train(config, ranks)
        assert TrainConfig.of(**config.to_json()) == config
        file = config.output / "run.json"
        assert parse_command_line(["--config", str(file)]) == dataclasses.replace(config, config=file)
        assert train(parse_command_line(["--config", str(file), "--steps", "2"]), ranks) == 0
