"""The same checks on two GPUs, through NCCL, and a video that needs both."""

import pytest

from tests.train.distributed.check_names import LAYOUT_CHECKS, LAYOUT_MODULE, ON_GPUS, TRAINING_CHECKS, TRAINING_MODULE
from tests.train.distributed.launch import run_checks

ALONE = [check for check in TRAINING_CHECKS if check != "a_run_goes_on_with_other_ranks"] + ON_GPUS
"""Those that need no run beside them."""


@pytest.mark.multigpu
def test_layouts_on_two_gpus(tmp_path):
    results = run_checks(LAYOUT_MODULE, LAYOUT_CHECKS, tmp_path, num_ranks=2, device="cuda")
    assert results == dict.fromkeys(LAYOUT_CHECKS, "ok")


@pytest.mark.multigpu
def test_training_on_two_gpus(tmp_path):
    assert run_checks(TRAINING_MODULE, ALONE, tmp_path, num_ranks=2, device="cuda") == dict.fromkeys(ALONE, "ok")


@pytest.mark.multigpu
def test_262k_tokens_train_on_two_gpus(tmp_path):
    check = "a_video_of_262k_tokens_trains"
    module = "tests.train.distributed.long_video_checks"
    assert run_checks(module, [check], tmp_path, num_ranks=2, device="cuda") == {check: "ok"}
    print((tmp_path / "report.json").read_text())
