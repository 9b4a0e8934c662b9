"""AdamW and the weights' moving average over flat tensors, against PyTorch in float64; on a GPU the kernel."""

import pytest
import torch
from torch import Tensor

from train.ops.adamw import AdamWSettings, adamw_step, step_factors

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.gpu,
    ),
]
SETTINGS = AdamWSettings(lr=3e-3, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.03)
CLIP, SHARE = 0.7, 0.3


class Flat:
    """Flat weights as a rank has them, and the model's, which lie in a larger tensor."""

    def __init__(self, numel: int, device: str, dtype: torch.dtype) -> None:
        self.weights = torch.randn(numel, device=device)
        self.moments = [torch.zeros(numel, device=device) for _ in range(2)]
        self.in_model = torch.zeros(numel + 2, device=device, dtype=dtype)[2:]  # as odd ranks' parts begin
        self.average = torch.randn(numel, device=device)
        self.steps = torch.zeros((), device=device)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weights, *self.moments, self.in_model, self.average, self.steps]

    def step(self, gradient: Tensor, *, num_summed: int = 1, settings: AdamWSettings = SETTINGS) -> Tensor:
        norm = gradient.float().norm() / num_summed
        factors = step_factors(norm, self.steps, settings, max_norm=CLIP, num_summed=num_summed)
        adamw_step(gradient, self.weights, *self.moments, self.in_model, factors, settings, self.average, SHARE)
        return factors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [1, 1023, 4096, 5001])
def test_steps_are_those_of_pytorchs_adamw_and_those_that_are_not_finite_are_left_out(device, dtype, numel):
    torch.manual_seed(0)
    flat = Flat(numel, device, dtype)
    right, average = flat.weights.double().requires_grad_(), flat.average.double()
    optimizer = torch.optim.AdamW(
        [right], lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay
    )
    for number, size in enumerate((1.0, 1e-3, torch.inf, 40.0, torch.nan, 1.0)):  # clipped and not
        gradient = (torch.randn(numel, device=device) * 2 / numel**0.5).to(dtype)
        gradient[number % numel] *= size
        taken = flat.step(2 * gradient, num_summed=2)[3]
        assert bool(taken) == bool(gradient.isfinite().all())
        if taken:
            right.grad = gradient.double()
            torch.nn.utils.clip_grad_norm_([right], CLIP)
            optimizer.step()
            average.lerp_(right.detach(), SHARE)
        state = optimizer.state[right]
        for found, expected in zip(
            (flat.weights, flat.average, *flat.moments),
            (right.detach(), average, state["exp_avg"], state["exp_avg_sq"]),
            strict=True,
        ):
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-7)
        assert torch.equal(flat.in_model, flat.weights.to(dtype))
    assert flat.steps.item() == 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_left_out_changes_no_bit(device):
    torch.manual_seed(0)
    flat = Flat(3000, device, torch.bfloat16)
    flat.step(torch.randn(3000, device=device))
    before = [t.clone() for t in flat.tensors]
    flat.step(torch.full((3000,), torch.nan, device=device))
    for old, new in zip(before, flat.tensors, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("device", DEVICES)
def test_bias_corrections_are_exact_at_the_first_and_at_late_steps(device):
    settings = AdamWSettings(lr=1.0, betas=(0.9, 0.9999), eps=0.0, weight_decay=0.0)
    for taken_before in (0, 1, 999, 2_000_000):
        steps = torch.tensor(float(taken_before), device=device)
        factors = step_factors(torch.tensor(0.5, device=device), steps, settings, max_norm=1.0, num_summed=1).tolist()
        count = taken_before + 1
        assert factors[1] == pytest.approx(1 / (1 - 0.9**count), rel=1e-7)
        assert factors[2] == pytest.approx((1 - 0.9999**count) ** -0.5, rel=1e-7)
        assert (factors[0], factors[3], steps.item()) == (1.0, 1.0, count)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_without_an_average_is_the_same(device):
    torch.manual_seed(0)
    gradient, alone, followed = torch.randn(700, device=device), *(Flat(700, device, torch.float32) for _ in range(2))
    alone.weights.copy_(followed.weights)
    factors = followed.step(gradient)
    adamw_step(gradient, alone.weights, *alone.moments, alone.in_model, factors, SETTINGS)
    assert torch.equal(alone.weights, followed.weights)
    assert torch.equal(alone.in_model, followed.in_model)
