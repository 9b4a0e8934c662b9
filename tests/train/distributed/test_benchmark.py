"""The step benchmark on two ranks."""

import os
import subprocess
import sys

import pytest

from tests.train.distributed.launch import ROOT, run_checks

MODULE = "tests.train.distributed.benchmark_checks"


def test_rows_of_two_ranks_count_what_each_does_and_choose_alike(tmp_path):
    checks = [
        "what_is_measured_on_one_device_is_refused_on_two",
        "rows_count_what_each_rank_does",
        "ranks_compute_again_what_the_smallest_device_asks_for",
    ]
    assert run_checks(MODULE, checks, tmp_path, num_ranks=2) == dict.fromkeys(checks, "ok")


@pytest.mark.slow
def test_two_ranks_are_measured_against_one_in_the_same_command(tmp_path):
    check = "several_ranks_stand_beside_one"
    assert run_checks(MODULE, [check], tmp_path, num_ranks=2) == {check: "ok"}


@pytest.mark.slow
def test_a_rank_without_memory_says_so_and_leaves_no_other_waiting(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.train.distributed.launch", MODULE, str(tmp_path), "one_rank_has_too_little_memory"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "error: stdit-xl/2 4x32, 2 GPUs, ours: rank 1 has too little memory" in done.stderr
