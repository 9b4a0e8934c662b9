"""The layouts of sequence parallelism, on two ranks and, slow, on three: heads and parts of unequal numbers."""

from pathlib import Path

import pytest

from tests.train.distributed.launch import run_checks

MODULE = "tests.train.distributed.layout_checks"
CHECKS = ["layouts_change_no_value_and_no_gradient", "what_cannot_be_spread_is_told"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(MODULE, CHECKS, tmp_path_factory.mktemp("layouts"), num_ranks=2)


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_two_ranks, check):
    assert on_two_ranks[check] == "ok"


@pytest.mark.slow
def test_on_three_ranks_layouts_change_no_value_and_no_gradient(tmp_path: Path):
    assert run_checks(MODULE, CHECKS[:1], tmp_path, num_ranks=3) == {CHECKS[0]: "ok"}


@pytest.mark.multigpu
def test_on_two_gpus(tmp_path: Path):
    assert run_checks(MODULE, CHECKS, tmp_path, num_ranks=2, device="cuda") == dict.fromkeys(CHECKS, "ok")
