"""How ranks find each other: Slurm's variables, DeepSpeed's launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import InputError
from tests.train.test_command_line import ENVIRONMENT, MODEL, metrics_of
from train.__main__ import main
from train.parallel.launchers import first_node, ranks_from_slurm

ROOT = Path(__file__).parents[2]
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_task_of_a_slurm_step_is_a_rank():
    environment = dict(STEP)
    ranks_from_slurm(environment)
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "24711"}
    assert environment == STEP | expected


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "2", "RANK": "0"},  # torchrun's, inside a step
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_ID": None},  # a batch script
    ],
    ids=str,
)
def test_what_is_no_step_of_several_tasks_is_left_alone(changes):
    environment = {name: value for name, value in (STEP | changes).items() if value is not None}
    before = dict(environment)
    ranks_from_slurm(environment)
    assert environment == before


def test_a_given_address_is_kept_and_missing_variables_are_named():
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    ranks_from_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")
    with pytest.raises(InputError, match="a Slurm step without SLURM_LOCALID: start it by srun"):
        ranks_from_slurm({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"})
    with pytest.raises(InputError, match="names no node: set MASTER_ADDR"):
        first_node("")


def test_a_step_that_does_not_say_all_of_it_ends_in_one_line(monkeypatch, capsys):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_LOCALID")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: this is a task of a Slurm step without SLURM_LOCALID")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("rack2-[7,9]-ib", "rack2-7-ib"),
        ("a1,a2", "a1"),
        ("n[12]", "n12"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert first_node(nodes) == first


def common(cache: str) -> list[str]:
    options = ["--steps", "2", "--log-every", "1", "--batch-size", "4", "--num-workers", "0", "--peak-tflops", "1"]
    return ["--cache", cache, *MODEL, *options]


def test_two_tasks_of_slurm_train_together(small_cache, tmp_path):
    slurm = STEP | {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "train", "--output", tmp_path / "run", *common(small_cache.url)],
            cwd=ROOT,
            env=ENVIRONMENT | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 x cpu" in outputs[0]
    assert outputs[1].count("step 2/2") == 0
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_deepspeeds_launcher_starts_ranks(small_cache, tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", "2", "--no_local_rank", "--module", "train", "--output", tmp_path / "run"]
    done = subprocess.run(
        [*map(str, command), *common(small_cache.url)],
        cwd=ROOT,
        env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
