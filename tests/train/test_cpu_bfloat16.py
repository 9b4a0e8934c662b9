"""bfloat16 products in float32 on processors without bfloat16 instructions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.small_models import KINDS, inputs, small_model
from train.model import create_model
from train.model.checkpointing import ACTIVATION_CHECKPOINTING
from train.ops.cpu_bfloat16 import Float32Products

SMALL = {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}


@pytest.fixture(autouse=True)
def _own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's linear: DeepSpeed puts another one in its place, for good, once a process has trained with stage 3."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def test_a_product_is_the_exact_one_rounded_once():
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in [(9, 64), (16, 64), (16,)])
    with Float32Products():
        found = torch.nn.functional.linear(a, b, bias)
    exact = a.double() @ b.double().T + bias.double()
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def gradients_of(model, context):
    torch.manual_seed(1)
    x, y = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 1, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model.zero_grad()
    with context:
        loss = model(x, torch.tensor([3.0, 700.0]), y, mask).square().mean()
        loss.backward()
    return loss.detach(), torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("activation_checkpointing", ACTIVATION_CHECKPOINTING)
def test_a_model_trains_as_near_to_float32_as_with_plain_bfloat16(activation_checkpointing):
    ratios = []
    for seed in range(4):  # one draw alone differs by a quarter either way
        torch.manual_seed(seed)
        model = create_model("stdit-ti/2", **SMALL, activation_checkpointing=activation_checkpointing)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.bfloat16()
        plain_loss, plain = gradients_of(model, torch.enable_grad())
        fast_loss, fast = gradients_of(model, Float32Products())
        exact_loss, exact = gradients_of(model.float(), torch.enable_grad())
        assert (fast_loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + 1e-2 * exact_loss
        ratios.append(float((fast - exact).norm() / (plain - exact).norm()))
    assert sum(ratios) / len(ratios) <= 1.2


class ProductDtypes(TorchDispatchMode):
    """Notes in which type products are computed."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(part in name for part in ("mm", "convolution", "scaled_dot_product")):
            self.seen.setdefault(name, set()).update(t.dtype for t in args if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_product_of_a_training_step_is_left_in_bfloat16(kind):
    model = small_model(kind).bfloat16()
    with ProductDtypes() as products, Float32Products():
        model(**inputs(kind)).square().mean().backward()
    assert {"addmm", "mm"} <= products.seen.keys()
    assert any(name.endswith("attention_for_cpu_backward") for name in products.seen)
    assert all(torch.bfloat16 not in dtypes for dtypes in products.seen.values()), products.seen


def test_float32_is_left_alone():
    a = torch.randn(4, 4)
    with Float32Products():
        assert torch.equal(a @ a, torch.mm(a, a))
        assert (a @ a).dtype is torch.float32
