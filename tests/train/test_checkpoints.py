"""Checkpoints under what happens to long runs: kills at every point, full disks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import InputError
from shared.stores.files import TEMPORARY_PREFIX
from tests.train.killed_runs import MORE_POINTS, POINTS
from train.batches import open_batches
from train.checkpoint_files import EMA_FILE, FOLDER, OPTIMISER_FILE, WEIGHTS_FILE, list_checkpoints
from train.tensor_file import FileRecord, TensorFile
from train.trainer import train

ROOT = Path(__file__).parents[2]


KilledRuns = tuple[Path, dict[str, list[int]]]
"""The folder of the runs, and by point how the killed run and the one after it ended."""


@pytest.fixture(scope="module")
def killed_runs(small_cache, tmp_path_factory: pytest.TempPathFactory) -> KilledRuns:
    return kill_and_go_on(small_cache.url, tmp_path_factory.mktemp("killed"), POINTS)


@pytest.fixture(scope="module")
def more_killed_runs(small_cache, tmp_path_factory: pytest.TempPathFactory) -> KilledRuns:
    return kill_and_go_on(small_cache.url, tmp_path_factory.mktemp("more"), MORE_POINTS)


def kill_and_go_on(cache: str, folder: Path, points: tuple[str, ...]) -> KilledRuns:
    options = {
        "cache": cache,
        "model": "stdit-ti/2",
        "model_settings": ["depth=2", "hidden_size=32", "num_heads=2"],
        "batch_size": 4,
        "steps": 6,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
        "ema_decay": 0.9,
        "log_every": 1,
        "num_workers": 0,
        "lr": 1e-3,
        "peak_tflops": 1.0,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed_runs", json.dumps(options), str(folder), *points],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    return folder, dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_bitwise_as_if_nothing_had_been(killed_runs, point):
    require_as_if_nothing_had_been(*killed_runs, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", MORE_POINTS)
def test_a_run_killed_at_any_other_point_goes_on_bitwise_as_if_nothing_had_been(more_killed_runs, point):
    require_as_if_nothing_had_been(*more_killed_runs, point)


def require_as_if_nothing_had_been(folder: Path, codes: dict[str, list[int]], point: str) -> None:
    assert codes[point] == [-9, 0]
    assert stable_metrics(folder / point) == stable_metrics(folder / "whole")
    (checkpoint,) = list_checkpoints(folder / point)
    (expected,) = list_checkpoints(folder / "whole")
    assert not [p for p in checkpoint.parent.iterdir() if p.name.startswith(TEMPORARY_PREFIX)]
    for name in (WEIGHTS_FILE, EMA_FILE, OPTIMISER_FILE):
        assert (checkpoint / name).read_bytes() == (expected / name).read_bytes(), name


def stable_metrics(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in ("step", "loss", "grad_norm", "lr")) for line in lines]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_no_older_checkpoint_and_ends_with_one_line(ranks, small_config, small_disk):
    config = small_config.changed(output=small_disk / "run", checkpoint_every=1, keep_checkpoints=50, steps=40)
    with pytest.raises(InputError, match="the disk is full .* while writing .*: make room there"):
        train(config, ranks)
    checkpoints = list_checkpoints(config.output)
    assert len(checkpoints) >= 2
    assert not [p for p in (config.output / FOLDER).iterdir() if p.name.startswith(TEMPORARY_PREFIX)]
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    steps = len(checkpoints) + 2
    train(config.changed(steps=steps), ranks)  # it goes on from the newest
    assert [c.name for c in list_checkpoints(config.output)] == [f"step-{n:08d}" for n in range(1, steps + 1)]


def test_metrics_that_the_disk_has_no_room_for_end_the_run_with_one_line_and_cost_no_checkpoint(
    ranks, small_config, small_disk, monkeypatch
):
    config = small_config.changed(output=small_disk / "run", steps=1)
    train(config, ranks)
    filler = small_disk / "filler"

    def fill_and_open(*arguments: Any, **named: Any) -> Any:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return open_batches(*arguments, **named)

    monkeypatch.setattr("train.trainer.open_batches", fill_and_open)
    with pytest.raises(InputError, match=r"the disk is full .* while writing metrics.jsonl; .*: make room there"):
        train(config.changed(steps=40), ranks)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(config.output)] == ["step-00000001"]
    filler.unlink()
    train(config.changed(steps=3), ranks)
    assert [row[0] for row in stable_metrics(config.output)] == [1, 2, 3]


def test_a_tensor_file_is_safetensors_and_its_record_tells_every_byte(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(()), "ünï": torch.randn(2, 0, 4), "d": torch.randn(70_000)}
    path = tmp_path / "x.safetensors"
    file = TensorFile(path, {name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        file.add(name, tensor)
    record = file.finish()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert FileRecord.of(path) == record
    path.write_bytes(path.read_bytes()[:-1])
    assert FileRecord.of(path) != record
