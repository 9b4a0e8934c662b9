"""Training in this process, as one rank."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import InputError
from tests.train.conftest import BUCKETS
from tests.train.synthetic_cache import write_cache
from train.checkpoint_files import EMA_FILE, STATE_FILE, WEIGHTS_FILE, list_checkpoints, superfluous
from train.config import CheckpointOptions, TrainConfig
from train.ema import decay_at
from train.metrics import MetricsLog
from train.model import create_model
from train.run_folder import RunDescription, open_run, read_run
from train.schedules import learning_rate
from train.step import TrainingStep
from train.trainer import train

LOSSES = ("step", "loss", "mse", "vb", "grad_norm", "lr")


def losses(run: Path) -> list[tuple[float, ...]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in LOSSES) for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32", "zero_stage": 0},
        {"precision": "float32"},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "zero_stage": 1, "activation_checkpointing": "full"},
        {"precision": "bfloat16", "zero_stage": 0},
        {"precision": "bfloat16", "zero_stage": 3, "gradient_accumulation": 2, "weight_decay": 0.01},
        {"precision": "bfloat16", "zero_stage": 3, "ema_decay": None},
    ],
    ids=str,
)
def test_a_resumed_run_has_bitwise_the_losses_and_weights_of_an_uninterrupted_one(ranks, small_config, changes):
    whole = small_config.changed(**changes)
    assert train(whole, ranks) == 0
    parts = whole.changed(output=whole.output.with_name("parts"), steps=4, checkpoint_every=3)
    train(parts, ranks)
    train(parts.changed(steps=6), ranks)
    assert [row[0] for row in losses(whole.output)] == [1, 2, 3, 4, 5, 6]
    assert losses(parts.output) == losses(whole.output)
    last = [list_checkpoints(config.output)[-1] for config in (whole, parts)]
    for file in (WEIGHTS_FILE, EMA_FILE) if whole.optimiser.ema_decay else (WEIGHTS_FILE,):
        expected, found = (load_file(checkpoint / file) for checkpoint in last)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file


def test_what_is_there_before_the_first_step_is_passed_by_when_garbage_is_sought_until_the_run_ends(
    ranks, small_config, monkeypatch
):
    frozen, take_step = [], TrainingStep.take

    def take(self, *args):
        frozen.append(gc.get_freeze_count())
        assert not any(each is self for each in gc.get_objects())  # those that are gone through
        return take_step(self, *args)

    monkeypatch.setattr(TrainingStep, "take", take)
    train(small_config.changed(steps=2), ranks)
    assert len(frozen) == 2
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_training_lowers_the_loss_in_bfloat16_as_in_float32(ranks, small_config):
    means = {}
    for precision in ("float32", "bfloat16"):
        config = small_config.changed(
            precision=precision, output=small_config.output / precision, steps=60, lr=3e-3, log_every=20
        )
        train(config, ranks)
        means[precision] = [row[2] for row in losses(config.output)]
    assert means["float32"][-1] < 0.9 * means["float32"][0]
    assert means["bfloat16"] == pytest.approx(means["float32"], rel=0.02)


def test_rectified_flow_and_min_snr_are_trained_when_asked_for(ranks, small_config):
    flow = small_config.changed(objective="rectified-flow", output=small_config.output / "flow", steps=40, lr=3e-3)
    train(flow, ranks)
    lines = [json.loads(line) for line in (flow.output / "metrics.jsonl").read_text().splitlines()]
    assert all("vb" not in line and line["loss"] == pytest.approx(line["mse"]) for line in lines)
    assert lines[0]["loss"] == pytest.approx(2, rel=0.15)  # x0 - noise is the answer, and a new model says 0
    assert sum(line["loss"] for line in lines[-8:]) / 8 < 0.85 * lines[0]["loss"]
    weighted = small_config.changed(min_snr_gamma=5.0, output=small_config.output / "weighted", steps=2)
    train(weighted, ranks)
    lines = [json.loads(line) for line in (weighted.output / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["loss"] for line in lines) < sum(line["mse"] + line["vb"] for line in lines) - 0.1


def test_the_average_follows_the_weights_of_every_step(ranks, small_config):
    config = small_config.changed(precision="float32", steps=3, checkpoint_every=1)
    train(config, ranks)
    torch.manual_seed(config.seed)
    model = create_model(read_run(config.output).config["model"], **read_run(config.output).model_config)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step, checkpoint in enumerate(list_checkpoints(config.output)):
        weights, saved = (load_file(checkpoint / file) for file in (WEIGHTS_FILE, EMA_FILE))
        decay = min(0.9, (1 + step) / (10 + step))
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * weights[name]
            torch.testing.assert_close(saved[name], average[name], atol=1e-6, rtol=1e-5)
    assert decay_at(10_000, 0.99) == 0.99


def test_master_weights_are_saved_in_float32_though_training_is_in_bfloat16(ranks, small_config):
    train(small_config.changed(steps=2), ranks)
    weights = load_file(list_checkpoints(small_config.output)[-1] / WEIGHTS_FILE)
    matrix = weights["blocks.0.mlp.fc1.weight"]
    assert matrix.dtype is torch.float32
    assert not torch.equal(matrix, matrix.bfloat16().float())


def test_old_checkpoints_go_and_leftovers_of_a_killed_save_count_for_nothing(ranks, small_config, capsys):
    config = small_config.changed(checkpoint_every=1, keep_checkpoints=2)
    leftover = config.output / "checkpoints" / ".tmp-step-00000009"
    train(config.changed(steps=1), ranks)
    leftover.mkdir()
    train(config, ranks)
    assert [c.name for c in list_checkpoints(config.output)] == ["step-00000005", "step-00000006"]
    assert not leftover.exists()
    assert "are taken" not in capsys.readouterr().out
    assert train(config, ranks) == 0
    assert "all 6 steps are taken: more by --steps go on from here" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused_and_the_run_goes_on_without_it(ranks, small_config):
    config = small_config.changed(steps=2, checkpoint_every=1)
    train(config, ranks)
    newest = list_checkpoints(config.output)[-1]
    weights = newest / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=rf"{weights}: found .*, expected .*: the file is damaged; delete {newest}"):
        train(config, ranks)
    shutil.rmtree(newest)
    (newest.parent / "step-00000009").mkdir()  # nobody's
    with pytest.raises(InputError, match="step-00000009/state.json: cannot be read"):
        train(config, ranks)
    (newest.parent / "step-00000009").rmdir()
    train(config, ranks)
    assert [checkpoint.name for checkpoint in list_checkpoints(config.output)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1]"], ids=["no text", "a list"])
def test_a_damaged_description_of_a_checkpoint_or_a_run_is_told_in_one_line(ranks, small_config, content):
    config = small_config.changed(steps=1)
    train(config, ranks)
    state = list_checkpoints(config.output)[-1] / STATE_FILE
    state.write_bytes(content)
    with pytest.raises(InputError, match=f"{state}: cannot be read"):
        train(config, ranks)
    (config.output / "run.json").write_bytes(content)
    with pytest.raises(InputError, match="run.json: not the description of a run"):
        train(config, ranks)


def test_weights_that_are_damaged_are_not_begun_with(ranks, small_config):
    config = small_config.changed(steps=1)
    train(config, ranks)
    weights = list_checkpoints(config.output)[-1] / EMA_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{weights}: cannot be read .*: choose another"):
        train(config.changed(init_from=str(config.output), output=config.output.with_name("other")), ranks)


def test_a_run_that_has_gone_on_for_longer_than_it_is_asked_to_says_so(ranks, small_config):
    train(small_config.changed(steps=2), ranks)
    assert train(small_config.changed(steps=2), ranks) == 0  # nothing is left to do
    with pytest.raises(InputError, match=r"steps=1: the run in .* has taken 2 already: use more"):
        train(small_config.changed(steps=1), ranks)


def test_an_output_that_cannot_be_made_is_told_in_one_line(ranks, small_config, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=f"{tmp_path}/file/run: file exists while making the run's folder"):
        train(small_config.changed(output=tmp_path / "file" / "run"), ranks)


def test_a_checkpoint_of_an_older_format_is_named(ranks, small_config):
    train(small_config.changed(steps=1), ranks)
    (list_checkpoints(small_config.output)[-1] / STATE_FILE).write_text('{"step": 1, "world_size": 2}')
    with pytest.raises(InputError, match="found a checkpoint of format 1, expected 2: go on with the version that"):
        train(small_config, ranks)


def test_a_run_goes_on_with_another_learning_rate_and_says_so(ranks, small_config, capsys):
    train(small_config.changed(steps=2), ranks)
    other = small_config.changed(steps=4, lr=1e-2, lr_schedule="linear", decay_steps=5, final_lr=1e-4, warmup_steps=1)
    capsys.readouterr()
    train(other, ranks)
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from step 2 on: "))
    for adjusted in (
        "lr=0.01 (before: 0.001)",
        "lr_schedule=linear (before: constant)",
        "decay_steps=5 (before: None)",
    ):
        assert adjusted in told
    lines = [json.loads(line) for line in (other.output / "metrics.jsonl").read_text().splitlines()]
    expected = [1e-3, 1e-3, *(learning_rate(step, other.optimiser, 5) for step in (2, 3))]
    assert [line["lr"] for line in lines] == expected
    assert read_run(other.output).config == other.changed(steps=2).to_json(), "what was adjusted, and nothing else"
    train(other.changed(steps=5), ranks)
    assert "from step" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"the run there has ema_decay=0.9 .*, this one has ema_decay=0.5"):
        train(other.changed(ema_decay=0.5), ranks)


def test_a_run_goes_on_at_another_zero_stage_with_the_same_losses(ranks, small_config):
    whole = small_config.changed(precision="float32", zero_stage=0)
    train(whole, ranks)
    parts = whole.changed(output=whole.output.with_name("parts"))
    for steps, stage in enumerate((3, 1, 2, 0), start=1):
        train(parts.changed(steps=steps, zero_stage=stage, checkpoint_every=1), ranks)
    train(parts.changed(zero_stage=3), ranks)
    expected, found = losses(whole.output), losses(parts.output)
    assert len(found) == 6
    for theirs, ours in zip(expected, found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_checkpoints_are_kept_by_rule():
    checkpoints = [Path(f"step-{step:08d}") for step in (5, 10, 15, 20, 25, 27)]
    gone = [path.name for path in superfluous(checkpoints, newest=2, every=10)]
    assert gone == ["step-00000005", "step-00000015"]
    assert superfluous(checkpoints, newest=6, every=None) == []
    assert superfluous(checkpoints, newest=1, every=None) == checkpoints[:-1]
    with pytest.raises(InputError, match="keep_every=15 is not a multiple of checkpoint_every=10"):
        CheckpointOptions(checkpoint_every=10, keep_every=15)


def test_a_run_folder_of_another_run_is_refused_and_both_values_are_named(ranks, small_config, tmp_path):
    train(small_config.changed(steps=1), ranks)
    others = [
        ({"seed": 7}, r"the run there has seed=0 .*, this one has seed=7"),
        ({"model_settings": ("depth=3", "hidden_size=32", "num_heads=2")}, r"depth=2.*depth=3"),
        ({"batch_size": 2}, r"batch_size=4 .* batch_size=2"),
    ]
    for changes, message in others:
        with pytest.raises(InputError, match=message):
            train(small_config.changed(**changes), ranks)
    file = small_config.output / "run.json"
    description = json.loads(file.read_text())
    description["provenance"]["latent"]["weights_sha256"] = "another autoencoder's"
    before = file.read_bytes()
    file.write_text(json.dumps(description))  # samples are known by their clips: the same ones, encoded otherwise
    with pytest.raises(
        InputError, match="latent weights_sha256=another autoencoder's .*latent weights_sha256=latent w"
    ):
        train(small_config, ranks)
    file.write_bytes(before)
    other_cache = write_cache(tmp_path / "other", {next(iter(BUCKETS)): 5}, seed=9)
    with pytest.raises(InputError, match=r"samples_sha256=\w+ \(cache .*small.*\), this one has .*other"):
        train(small_config.changed(cache=other_cache.url), ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "/nowhere"}, "/nowhere: found no dataset.json"),
        ({"model": "stdit-xxl/2"}, "unknown model 'stdit-xxl/2': choose from"),
        ({"model_settings": ("depth",)}, "--set depth: expected NAME=VALUE"),
        (
            {"model_settings": ("hidden_size=32", "mlp_ratio=0.01")},
            "mlp_ratio=0.01: expected a number of at least 1 / 32",
        ),
        ({"model_settings": ("mlp_ratio=1e999",)}, "mlp_ratio=inf: expected a number"),
        ({"model_settings": ("in_channels=3",)}, "--set in_channels=3: the cache decides it"),
        ({"model_settings": ("num_classes=7",), "model": "dit-ti/2"}, "--set num_classes=7: a cache has captions"),
        ({"model_settings": ("pred_sigma=false",)}, "pred_sigma=false: the loss teaches the variance too"),
        ({"buckets": ("9x9x9",)}, "bucket 9x9x9: the cache holds 2x32x32, 3x32x48"),
        ({"min_snr_gamma": 5.0, "objective": "rectified-flow"}, "min_snr_gamma=5.0 does nothing with objective=rect"),
        (
            {"mask_ratios": ("image_head=0.2",)},
            "mask_ratios=image_head=0.2: stdit-ti/2 cannot be told which frames are",
        ),
        (
            {"mask_ratios": ("image_head=0.2",), "model": "stdit3-ti/2", "model_settings": ("patch_size=[2,2,2]",)},
            "mask_ratios=image_head=0.2: patches of 2 frames cannot be given in part",
        ),
        ({"attention_backend": "cudnn"}, "'cudnn' is not available on cpu"),
        ({"sequence_parallel": 2}, "sequence_parallel=2 does not divide the 1 rank: use 1"),
        ({"offload": "optimizer"}, "offload=optimizer does nothing without a GPU"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_before_anything_is_written(ranks, small_config, changes, message):
    with pytest.raises(InputError, match=message):
        train(small_config.changed(**changes), ranks)
    assert not small_config.output.exists()


def test_settings_that_cannot_be_are_refused():
    for changes, message in [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"lr": float("inf")}, "lr=inf: expected more than 0, and a finite number"),
        ({"lr": 0.0}, "lr=0.0: expected more than 0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"zero_stage": 0, "gradient_accumulation": 2}, "add gradients up in bfloat16 at zero_stage=0"),
        ({"zero_stage": 0, "offload": "optimizer"}, "offload=optimizer does nothing at zero_stage=0"),
        ({"offload": "all"}, "offload=all needs zero_stage=3, found 2"),
        ({"sequence_parallel": 0}, "sequence_parallel=0: expected at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            TrainConfig.of(cache="c", output=Path("o"), **changes)


def test_an_output_folder_with_other_files_is_left_alone(ranks, small_config):
    small_config.output.mkdir()
    (small_config.output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found files but no run.json"):
        train(small_config, ranks)
    assert [entry.name for entry in small_config.output.iterdir()] == ["thesis.txt"]


def test_a_run_that_was_started_before_there_was_an_option_goes_on_with_its_default(small_config, tmp_path):
    run = RunDescription(
        config=small_config.to_json(), model_config={}, provenance={}, buckets={}, samples_sha256="of the samples"
    )
    older = dataclasses.replace(run, config={k: v for k, v in run.config.items() if k not in ("variants", "buckets")})
    open_run(tmp_path / "older", older)
    open_run(tmp_path / "older", run)
    every = small_config.changed(variants="all")
    with pytest.raises(InputError, match="the run there has variants=one .*, this one has variants=all"):
        open_run(tmp_path / "older", dataclasses.replace(run, config=every.to_json()))


def test_lines_of_steps_that_no_checkpoint_kept_are_dropped_from_the_metrics(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    MetricsLog(tmp_path, steps=9, first_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
