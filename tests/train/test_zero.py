"""DeepSpeed's engine as we have it."""

import pytest
import torch
from torch.autograd.graph import _get_grad_fn_or_grad_acc
from torch.utils._python_dispatch import TorchDispatchMode

from train.model import create_model
from train.parallel.master_weights import MasterWeights
from train.parallel.zero import build_engine, take_step


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: kernels, on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_does_not_look_at_one_parameter_after_the_other(ranks, small_config, stage):
    model = create_model("stdit-ti/2", hidden_size=32, num_heads=2, caption_channels=8)
    engine, _ = build_engine(model, small_config.changed(zero_stage=stage, precision="float32"), ranks.device, 1)
    x, y, timestep = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 1, 3, 8), torch.tensor([5.0])
    engine.backward(engine(x, timestep, y).square().mean())
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    with Operations() as operations:
        norm, verdict = take_step(engine, model)
    assert verdict.wait()
    torch.testing.assert_close(norm, expected)
    assert operations.count < 60 < len(list(model.parameters()))  # however many there are


def test_weights_are_exchanged_on_the_ranks_device_wherever_parameters_are_offloaded(ranks, small_config, monkeypatch):
    model = create_model("stdit-ti/2", hidden_size=32, num_heads=2, caption_channels=8)
    engine, _ = build_engine(model, small_config.changed(zero_stage=3), ranks.device, 1)
    elsewhere = torch.device("meta")  # parameters and masters lie on the CPU here
    masters = MasterWeights(engine, model, elsewhere)
    sent = []
    monkeypatch.setattr("train.parallel.master_weights.dist.all_reduce", lambda tensor: sent.append(tensor.device))
    masters.gather(masters.parts(), masters.trained[0], to=None)
    assert sent == [elsewhere]


@pytest.mark.parametrize("stage", [1, 2])
def test_no_node_of_autograd_outlives_a_step(ranks, small_config, stage):
    """It would work on the stream that it was made on, where a graph is recorded on another."""
    model = create_model("stdit-ti/2", hidden_size=32, num_heads=2, caption_channels=8)
    engine, _ = build_engine(model, small_config.changed(zero_stage=stage), ranks.device, 1)
    inputs = torch.randn(1, 4, 2, 4, 4), torch.tensor([5.0]), torch.randn(1, 1, 3, 8)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: _get_grad_fn_or_grad_acc(parameter).metadata.update(used=True)
        )
    engine.backward(engine(*inputs).square().mean())
    take_step(engine, model)
    with torch.enable_grad():
        assert not any(_get_grad_fn_or_grad_acc(parameter).metadata for parameter in model.parameters())
