"""The layouts of sequence parallelism, on two ranks and, slow, on three: heads and parts of unequal numbers."""

from pathlib import Path

import pytest
import torch

from tests.train.distributed.check_names import LAYOUT_CHECKS, LAYOUT_MODULE
from tests.train.distributed.launch import run_checks
from train.parallel.exchange import _pack, _unpack, part_sizes


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(LAYOUT_MODULE, LAYOUT_CHECKS, tmp_path_factory.mktemp("layouts"), num_ranks=2)


@pytest.mark.parametrize("check", LAYOUT_CHECKS)
def test_on_two_ranks(on_two_ranks, check):
    assert on_two_ranks[check] == "ok"


@pytest.mark.slow
def test_on_three_ranks_layouts_change_no_value_and_no_gradient(tmp_path: Path):
    assert run_checks(LAYOUT_MODULE, LAYOUT_CHECKS[:1], tmp_path, num_ranks=3) == {LAYOUT_CHECKS[0]: "ok"}


@pytest.mark.parametrize("frames", [4, 5])
def test_frames_of_one_sample_travel_from_and_to_where_they_lie(frames: int):
    x, sizes = torch.randn(1, frames, 6, 8), part_sizes(frames, 2)
    sent, numels = _pack(x, 1, sizes)
    received = _unpack(sent, [[1, size, 6, 8] for size in sizes], numels, 1)
    assert sent.data_ptr() == received.data_ptr() == x.data_ptr()
    assert torch.equal(received, x)
    assert numels == [size * 6 * 8 for size in sizes]
