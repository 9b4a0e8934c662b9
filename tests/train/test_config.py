"""From a preset, a file and the command line to one configuration."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from shared.errors import InputError
from train.__main__ import main
from train.building import build_model
from train.config import ADJUSTABLES, DEFAULTS, FREE_TO_CHANGE, TrainConfig
from train.config.command_line import parse_command_line
from train.config.files import value_from_json
from train.config.presets import Preset, preset_values
from train.model import model_config

PLACES = ("--cache", "c", "--output", "o")


def test_the_command_line_goes_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("lr: 2e-4\nema_decay: null\nadam_betas: [0.8, 0.9]\nlocal_cache: /somewhere\n")
    words = ("--preset", "opensora-v1-64x512", "--config", str(file), *PLACES, "--adam-betas", "0.7", "0.6")
    config = parse_command_line(words)
    assert config.data.buckets == ("64x512x512",)
    assert config.parallel.activation_checkpointing == "full"
    assert config.optimiser.lr == 2e-4
    assert config.optimiser.ema_decay is None
    assert config.data.local_cache == Path("/somewhere")
    assert config.optimiser.adam_betas == (0.7, 0.6)
    assert parse_command_line((*words, "--lr", "1")).optimiser.lr == 1


def test_what_a_run_saves_is_a_file_that_gives_the_same_configuration(tmp_path, capsys):
    words = (*PLACES, "--set", "depth=2", "--where", "fps > 5", "--ema-decay", "None", "--lr-schedule", "cosine")
    config = parse_command_line(words)
    for name, content in (("plain", config.to_json()), ("run", {"config": config.to_json(), "model_config": {}})):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        again = parse_command_line(("--config", str(file)))
        assert again.to_json() == config.to_json()
        assert again.changed(config=None).optimiser.decay_steps == 1000
    assert json.loads(json.dumps(DEFAULTS)).keys() == config.to_json().keys() - {"output"}


def test_the_resolved_configuration_is_printed_and_nothing_is_done(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    monkeypatch.setattr(
        "sys.argv", ["train", "--cache", "/none", "--output", str(output), "--lr", "3", "--print-config"]
    )
    monkeypatch.setattr("train.__main__.join_ranks", _OneRank)
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["lr"] == 3
    assert not output.exists()


class _OneRank:
    """The session's tests have joined a group already."""

    is_first = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def agree(self, work):
        return work()


@pytest.mark.parametrize("name", get_args(Preset))
def test_a_preset_fits_together_and_names_a_model(name):
    begin = ("--init-from", "weights.pth") if name == "finetune-24gb" else ()
    values = preset_values(name) | ({"init_from": "weights.pth"} if begin else {})
    config = TrainConfig.of(cache="c", output=Path("o"), **values)
    with torch.device("meta"):
        model = build_model(model_config(config.architecture.model, **config.architecture.overrides), config)
    assert any(p.requires_grad for p in model.parameters())
    trains_all = not config.finetuning.freeze and config.finetuning.lora_rank is None
    assert all(p.requires_grad for p in model.parameters()) == trains_all
    assert parse_command_line(("--preset", name, *PLACES, *begin)).changed(preset=None) == config


def test_a_preset_repeats_the_published_stage():
    first, last = (parse_command_line(("--preset", f"opensora-v1-{s}", *PLACES)) for s in ("16x256", "64x512"))
    assert (first.optimiser.lr, first.optimiser.gradient_clip, first.optimiser.ema_decay) == (2e-5, 1.0, 0.9999)
    assert first.architecture.overrides == {"space_scale": 0.5, "time_scale": 1.0}
    assert last.architecture.overrides == {"space_scale": 1.0, "time_scale": pytest.approx(2 / 3)}


def test_how_a_run_learns_from_a_step_on_may_be_adjusted():
    assert {"lr", "lr_schedule", "decay_steps", "final_lr", "warmup_steps"} == ADJUSTABLES


def test_an_option_that_may_change_decides_nothing_that_is_learnt():
    assert {"cache", "steps", "num_workers", "zero_stage", "gradient_accumulation"} <= FREE_TO_CHANGE
    assert not {"lr", "seed", "batch_size", "model", "caption_dropout", "precision"} & FREE_TO_CHANGE


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.toml", "", "expected a .json, .yaml or .yml file"),
        ("a.yaml", "lr: [", "a.yaml: not YAML"),
        ("a.json", "[1]", "expected options by name, found list"),
        ("a.json", '{"learning_rate": 1}', "unknown option 'learning_rate': expected one that --help shows"),
        ("a.json", '{"print_config": true}', "unknown option 'print_config'"),
        ("a.json", '{"steps": 1.5}', "steps=1.5: expected a whole number"),
        ("a.json", '{"zero_stage": 4}', "zero_stage=4: expected 0 or 1 or 2 or 3"),
        ("a.json", '{"tensorboard": 1}', "tensorboard=1: expected true or false"),
        ("a.json", '{"adam_betas": [0.9]}', "adam_betas=.*: expected a list of a number"),
        ("a.yaml", "ema_decay: much", "ema_decay='much': expected a number or null"),
        ("a.json", '{"batch_size": 0}', "batch_size=0: expected at least 1"),
        ("missing.json", None, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line(tmp_path, name, content, complaint):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=complaint):
        parse_command_line(("--config", str(file), *PLACES))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--preset", "opensora-v9"), "--preset opensora-v9: choose from opensora-v1-16x256"),
        (("--final-lr", "1e-6"), "do nothing with a constant lr"),
        (("--lr-schedule", "linear", "--final-lr", "1"), "final_lr=1.0: expected 0 to lr=2e-05"),
        (("--lr-schedule", "linear", "--warmup-steps", "9", "--decay-steps", "9"), "expected more than warmup_steps=9"),
        (("--max-nan-steps", "3"), "max_nan_steps=3 does nothing without --on-nan skip"),
        (("--adam-betas", "0.9", "1"), "expected 0 <= beta < 1"),
        (("--local-cache-gb", "5"), "local_cache_gb=5.0 does nothing without --local-cache"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(words, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_command_line((*PLACES, *words))


def test_every_option_can_be_read_from_what_is_written_of_it():
    for name, value in DEFAULTS.items():
        read = value_from_json(name, json.loads(json.dumps(value)))
        assert json.loads(json.dumps(read)) == value, name
