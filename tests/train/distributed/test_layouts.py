"""The layouts of sequence parallelism, on two ranks and, slow, on three: heads and parts of unequal numbers."""

from pathlib import Path

import pytest

from tests.train.distributed.check_names import LAYOUT_CHECKS, LAYOUT_MODULE
from tests.train.distributed.launch import run_checks


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(LAYOUT_MODULE, LAYOUT_CHECKS, tmp_path_factory.mktemp("layouts"), num_ranks=2)


@pytest.mark.parametrize("check", LAYOUT_CHECKS)
def test_on_two_ranks(on_two_ranks, check):
    assert on_two_ranks[check] == "ok"


@pytest.mark.slow
def test_on_three_ranks_layouts_change_no_value_and_no_gradient(tmp_path: Path):
    assert run_checks(LAYOUT_MODULE, LAYOUT_CHECKS[:1], tmp_path, num_ranks=3) == {LAYOUT_CHECKS[0]: "ok"}
