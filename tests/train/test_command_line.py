"""``python -m train`` in processes of its own: several ranks, signals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from train.checkpoint_files import list_checkpoints

ROOT = Path(__file__).parents[2]
MODEL = ("--model", "stdit-ti/2", "--set", "depth=2", "hidden_size=32", "num_heads=2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def metrics_of(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_under_torchrun_train_as_one_does(small_cache, tmp_path):
    common = ("--cache", small_cache.url, *MODEL, "--steps", "4", "--log-every", "1", "--batch-size", "4")
    common = (*common, "--lr", "1e-3", "--ema-decay", "0.9", "--checkpoint-every", "1")
    two = run(*TORCHRUN, "--output", tmp_path / "two", *common)
    assert two.returncode == 0, two.stderr
    assert "ZeRO 2, 2 x cpu, batch 4, attention flash, activation checkpointing none" in two.stdout
    assert "(measured)" in two.stdout
    assert two.stdout.count("step 4/4") == 1
    one = run(sys.executable, "-m", "train", "--output", tmp_path / "one", *common)
    assert one.returncode == 0, one.stderr
    for found, expected in zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=3e-3), name
        assert found["samples_per_second"] > 0
        assert 0 < found["mfu"] < 1.5
    for file in ("model.safetensors", "ema.safetensors"):
        weights = [load_file(list_checkpoints(tmp_path / name)[-1] / file) for name in ("one", "two")]
        assert weights[0].keys() == weights[1].keys()
        for name, expected in weights[0].items():
            assert (weights[1][name] - expected).abs().max() < 4e-3, name  # 4 steps of Adam at 1e-3

    resumed = run(*TORCHRUN, "--output", tmp_path / "two", *common, "--steps", "6")
    assert resumed.returncode == 0, resumed.stderr
    assert "steps 4 to 6" in resumed.stdout


def test_under_torchrun_an_error_is_printed_once(small_cache, tmp_path):
    failed = run(*TORCHRUN, "--cache", small_cache.url, "--output", tmp_path / "run", *MODEL, "--batch-size", "5")
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "batch_size=5" in line]
    assert lines == ["error: batch_size=5 is not divisible by 2 ranks: use 4 or 6"]
    assert str(ROOT / "train") not in failed.stderr  # no traceback but torchrun's own


def test_a_missing_cache_is_one_line_and_a_wrong_option_names_itself(tmp_path):
    failed = run(sys.executable, "-m", "train", "--cache", tmp_path / "none", "--output", tmp_path / "run")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert "none: found no dataset.json" in failed.stderr
    wrong = run(sys.executable, "-m", "train", "--cash", tmp_path)
    assert wrong.returncode == 2
    assert "--cash" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),
        (os.killpg, signal.SIGUSR1),
        (os.killpg, signal.SIGINT),
    ],
    ids=["to the trainer", "to its process group", "SIGUSR1 to its process group", "Ctrl-C"],
)
def test_a_signal_saves_after_the_current_step_and_the_exit_code_asks_to_go_on(small_cache, tmp_path, send, number):
    command = (sys.executable, "-m", "train", "--cache", small_cache.url, "--output", tmp_path / "run", *MODEL)
    process = subprocess.Popen(
        [*map(str, command), "--steps", "1000000", "--log-every", "1", "--batch-size", "2", "--peak-tflops", "1"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    send(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "of 1000000 steps: run it again to go on" in output.splitlines()[-1]
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == f"step-{metrics_of(tmp_path / 'run')[-1]['step']:08d}"
