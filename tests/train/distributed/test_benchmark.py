"""The step benchmark on two ranks."""

import time

import pytest

from tests.train.distributed.launch import run_checks

MODULE = "tests.train.distributed.benchmark_checks"


def test_rows_of_two_ranks_count_what_each_does(tmp_path):
    check = "rows_count_what_each_rank_does"
    assert run_checks(MODULE, [check], tmp_path, num_ranks=2) == {check: "ok"}


@pytest.mark.slow
def test_two_ranks_are_measured_against_one_in_the_same_command(tmp_path):
    check = "several_ranks_stand_beside_one"
    assert run_checks(MODULE, [check], tmp_path, num_ranks=2) == {check: "ok"}


@pytest.mark.slow
def test_a_rank_without_memory_leaves_no_other_waiting(tmp_path):
    check, start = "one_rank_has_too_little_memory", time.monotonic()
    result = run_checks(MODULE, [check], tmp_path, num_ranks=2)[check]
    assert "stdit-xl/2 16x256, 2 GPUs, ours: rank 1 has too little memory" in result
    assert time.monotonic() - start < 300  # a collective would wait for half an hour
