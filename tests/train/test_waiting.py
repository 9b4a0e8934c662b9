"""What the host waits for while it trains on a GPU: for no step that it has just launched."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.distributed.training_checks import LR, batch_of, mask_ratios_of, objective_of
from train.config import TrainConfig
from train.ema import Ema
from train.metrics import Totals
from train.model import create_model
from train.parallel.verdict import Verdict
from train.parallel.zero import build_engine
from train.step import TrainingStep


def test_a_verdict_that_the_host_has_is_on_the_device_too():
    for applied in (True, False):
        verdict = Verdict.of(applied, torch.device("cpu"))
        assert (verdict.known, verdict.wait(), bool(verdict.taken)) == (applied, applied, applied)
    asked = Verdict(torch.tensor(1.0))
    assert asked.known is None
    assert asked.wait()
    assert asked.known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["stdit-ti/2", "stdit3-ti/2", "dit-ti/2"])
def test_a_step_is_launched_without_waiting_for_the_device(ranks, name, stage):
    """PyTorch raises an error where something waits. The verdict on a step comes when the next one is launched."""
    model = create_model(
        name, depth=2, hidden_size=64, num_heads=2, caption_channels=16, model_max_length=7, in_channels=4
    )
    config = TrainConfig.of(cache="none", output=Path("none"), model=name, zero_stage=stage)
    engine, masters = build_engine(model, config, ranks.device, 1)
    objective, ema = objective_of(name), Ema(masters, 0.9)
    step = TrainingStep(engine, model, objective, mask_ratios=mask_ratios_of(model))
    totals, before = Totals(ranks.device, objective.parts), None
    whole = batch_of(0)
    pinned = {
        f.name: v.pin_memory() for f in dataclasses.fields(whole) if isinstance(v := getattr(whole, f.name), Tensor)
    }
    batch = dataclasses.replace(whole, **pinned)
    try:
        for number in range(5):
            if number == 2:  # kernels are compiled, tables are made
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            result = step.take(batch.to(ranks.device), LR)
            ema.update(number, result.verdict)
            totals.add(result, batch, model.config, 0.0)
            if before is not None:
                assert before.wait()
            before = result.verdict
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.applied
    assert masters.steps() == 5
