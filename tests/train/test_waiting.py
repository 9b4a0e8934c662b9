"""What the host waits for while it trains: for no step that it has just launched."""

import pytest
import torch

from tests.train.distributed.step_checks import steps_are_launched_without_waiting
from train.parallel.verdict import Verdict


def test_a_verdict_that_the_host_has_is_on_the_device_too():
    for applied in (True, False):
        verdict = Verdict.of(applied, torch.device("cpu"))
        assert (verdict.known, verdict.wait(), bool(verdict.taken)) == (applied, applied, applied)
    asked = Verdict(torch.tensor(1.0))
    assert asked.known is None
    assert asked.wait()
    assert asked.known


@pytest.mark.gpu
def test_a_step_is_launched_without_waiting_for_the_gpu(ranks, tmp_path):
    steps_are_launched_without_waiting(ranks, tmp_path)
