"""Training on several ranks against one process: one launch of two ranks for all, more ranks and GPUs apart."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.distributed.check_names import ON_FOUR, TRAINING_CHECKS, TRAINING_MODULE
from tests.train.distributed.launch import ROOT, run_checks
from tests.train.test_command_line import ENVIRONMENT, MODEL
from tests.train.test_trainer import losses
from train.checkpoint_files import list_checkpoints
from train.config import TrainConfig
from train.trainer import train

OPTIONS = {
    "model": "stdit-ti/2",
    "model_settings": ("depth=2", "hidden_size=32", "num_heads=2"),
    "freeze": ("y_embedder",),
    "precision": "float32",
    "batch_size": 4,
    "steps": 6,
    "lr": 1e-3,
    "ema_decay": 0.9,
    "log_every": 1,
    "num_workers": 0,
    "peak_tflops": 1.0,
}


@pytest.fixture(scope="module")
def run_on_two_ranks(ranks, small_cache, tmp_path_factory: pytest.TempPathFactory):
    """A run that one rank begins, two ranks go on with, and one rank ends; and what became of all checks."""
    folder = tmp_path_factory.mktemp("training")
    config = TrainConfig.of(cache=small_cache.url, output=folder / "run", **OPTIONS)
    train(config.changed(steps=2), ranks)
    (folder / "options.json").write_text(json.dumps(OPTIONS | {"cache": small_cache.url, "steps": 4}))
    return config, run_checks(TRAINING_MODULE, TRAINING_CHECKS, folder, num_ranks=2)


@pytest.mark.parametrize("check", TRAINING_CHECKS)
def test_on_two_ranks(run_on_two_ranks, check):
    assert run_on_two_ranks[1][check] == "ok"


def test_a_run_goes_on_with_other_ranks_and_stages_and_the_same_losses(run_on_two_ranks, ranks, small_cache, tmp_path):
    config, _ = run_on_two_ranks
    train(config, ranks)
    whole = TrainConfig.of(cache=small_cache.url, output=tmp_path / "run", **OPTIONS)
    train(whole, ranks)
    expected, found = losses(whole.output), losses(config.output)
    assert [row[0] for row in found] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    assert run_checks(TRAINING_MODULE, ON_FOUR, tmp_path, num_ranks=4) == dict.fromkeys(ON_FOUR, "ok")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_killed_at_any_moment_go_on_bitwise(small_cache, tmp_path, stage):
    """Both ranks are killed, each time a little later after a checkpoint, until a run comes through."""
    assert [rank.wait(timeout=500) for rank in start_two_ranks(small_cache.url, tmp_path / "whole", stage)] == [0, 0]
    kills = 0
    while True:
        ranks_of_a_run = start_two_ranks(small_cache.url, tmp_path / "killed", stage)
        enough = progress(tmp_path / "killed") + 3
        while ranks_of_a_run[0].poll() is None and progress(tmp_path / "killed") < enough:
            time.sleep(0.01)
        time.sleep(0.05 * kills)
        if ranks_of_a_run[0].poll() is not None:
            break
        for rank in ranks_of_a_run:
            rank.kill()
        kills += 1
    assert [rank.wait(timeout=60) for rank in ranks_of_a_run] == [0, 0]
    assert kills >= 3
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        whole, killed = (list_checkpoints(tmp_path / run)[-1] / name for run in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name


def start_two_ranks(cache: str, output: Path, stage: int) -> list[subprocess.Popen[bytes]]:
    """Starts them without a launcher, which would outlive a kill."""
    options = ["--zero-stage", str(stage), "--sequence-parallel", "2", "--steps", "14", "--checkpoint-every", "1"]
    options += ["--lr", "1e-3", "--batch-size", "4", "--log-every", "1", "--num-workers", "0"]
    options += ["--peak-tflops", "1", "--ema-decay", "0.9"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "train", "--cache", cache, "--output", str(output), *MODEL, *options]
    return [
        subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def progress(run: Path) -> int:
    """Returns the step of the newest checkpoint; 0 if there is none."""
    checkpoints = list_checkpoints(run)
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
