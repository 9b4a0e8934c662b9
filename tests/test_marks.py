"""Tests that are marked for GPUs run where there are as many, and nowhere else."""

import pytest
import torch

from tests.conftest import pytest_runtest_setup


@pytest.mark.parametrize(("mark", "needed"), [("gpu", 1), ("multigpu", 2), ("slow", 0)])
def test_a_test_for_gpus_is_skipped_where_there_are_too_few(request, monkeypatch, mark, needed):
    item = pytest.Function.from_parent(request.node.parent, name="marked", callobj=lambda: None)
    item.add_marker(mark)
    for found in range(3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        if found < needed:
            with pytest.raises(pytest.skip.Exception, match=f"needs {needed} CUDA device"):
                pytest_runtest_setup(item)
        else:
            pytest_runtest_setup(item)


def test_a_test_for_hopper_is_skipped_on_other_gpus(request, monkeypatch):
    item = pytest.Function.from_parent(request.node.parent, name="marked", callobj=lambda: None)
    item.add_marker("gpu")
    item.add_marker("hopper")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(pytest.skip.Exception, match="needs compute capability 9.0"):
        pytest_runtest_setup(item)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    pytest_runtest_setup(item)
