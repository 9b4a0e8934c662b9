"""What a model is trained for, behind one interface."""

import pytest
import torch

from shared.errors import InputError
from train.diffusion import iddpm, rectified_flow
from train.diffusion.objective import bucket_draws, create_objective

SHAPE = (4, 2, 3, 4, 4)


def draw(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(SHAPE, generator=generator) for name in names}


def test_iddpm_takes_the_levels_of_the_draws_and_gives_the_hybrid_loss():
    values = draw("x0", "noise", "eps", "place")
    objective = create_objective("iddpm", model="m", spatial_stride=8)
    u = torch.tensor([0.0, 0.3337, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    level = torch.tensor([0, 333, 999, 999])
    assert objective.timesteps(u, (3, 4, 4)).tolist() == level.tolist()

    def denoise(x, timestep):
        assert timestep.tolist() == level.tolist()
        return torch.cat([values["eps"], values["place"]], dim=1)

    terms = objective.loss(denoise, values["x0"], u, values["noise"])
    expected = iddpm.training_loss(iddpm.linear_schedule(), denoise, values["x0"], level, values["noise"])
    assert torch.equal(terms.loss, expected.loss)
    assert tuple(terms.parts) == objective.parts == ("mse", "vb")
    assert objective.learns_variance


@pytest.mark.parametrize(
    ("settings", "ratio"), [({}, (32 * 32 / 512**2) ** 0.5 * 3**0.5), ({"flow_shift": False}, 1.0)]
)
def test_rectified_flow_shifts_the_times_of_the_draws_by_the_size_of_the_clip(settings, ratio):
    values = draw("x0", "noise", "answer")
    objective = create_objective("rectified-flow", model="m", spatial_stride=8, **settings)
    u = torch.tensor([0.1, 0.5, 0.7, 0.9], dtype=torch.float64)
    t = rectified_flow.times_at(u, "logit-normal")
    expected = ratio * t / (1 + (ratio - 1) * t)
    told = []

    def denoise(x, timestep):
        told.append(timestep)
        return values["answer"]

    terms = objective.loss(denoise, values["x0"], u, values["noise"])
    torch.testing.assert_close(told[0], (1000 * expected).float())
    assert torch.equal(told[0], objective.timesteps(u, (3, 4, 4)))
    again = rectified_flow.training_loss(denoise, values["x0"], expected, values["noise"])
    torch.testing.assert_close(terms.loss, again.loss)
    assert tuple(terms.parts) == objective.parts == ("mse",)
    uniform = create_objective("rectified-flow", model="m", spatial_stride=8, flow_times="uniform", flow_shift=False)
    torch.testing.assert_close(uniform.timesteps(u, (3, 4, 4)), (1000 * u).float())


@pytest.mark.parametrize("name", ["iddpm", "rectified-flow"])
def test_given_frames_do_not_matter_to_the_loss_of_any_objective(name):
    values = draw("x0", "noise", "answer", "place")
    objective = create_objective(name, model="m", spatial_stride=8)
    u = torch.tensor([0.0001, 0.3, 0.6, 0.9], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True], [True, True, True], [False, False, True]])
    answer = torch.cat([values["answer"], values["place"]], dim=1).requires_grad_()
    seen = []

    def denoise(x, timestep):
        seen.append(x)
        return answer

    terms = objective.loss(denoise, values["x0"], u, values["noise"], frame_mask=mask)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), answer)
    given = ~mask[:, None, :, None, None].expand(-1, 2, -1, 4, 4)
    assert torch.equal(seen[0][given], values["x0"][given])
    assert gradient[:, :2][given].abs().max() == 0
    assert gradient[:, :2][~given].abs().min() > 0
    whole = objective.loss(denoise, values["x0"], u, values["noise"])
    for part in objective.parts:
        torch.testing.assert_close(terms.parts[part][2], whole.parts[part][2])
        assert not torch.isclose(terms.parts[part][0], whole.parts[part][0])
    if name == "iddpm":  # the shift of rectified flow depends on the number of frames
        last = slice(3, 4), slice(None), slice(2, 3)
        alone = objective.loss(lambda x, t: answer[last], values["x0"][last], u[3:], values["noise"][last])
        torch.testing.assert_close(terms.loss[3:], alone.loss)


def test_min_snr_weighs_the_error_of_the_noise_and_not_the_bound():
    schedule = iddpm.linear_schedule()
    level = torch.tensor([0, 200, 500, 999])
    share = schedule.alpha_bars[level]
    snr = share / (1 - share)
    expected = torch.tensor([min(s, 5.0) / s for s in snr.tolist()], dtype=torch.float64)
    torch.testing.assert_close(iddpm.min_snr_weights(schedule, level, 5.0), expected)
    assert expected[0] < 0.001
    assert expected[-1] == 1

    values = draw("x0", "noise", "eps", "place")
    u = (level.double() + 0.5) / 1000
    plain, weighted = (
        create_objective("iddpm", model="m", spatial_stride=8, min_snr_gamma=gamma).loss(
            lambda x, t: torch.cat([values["eps"], values["place"]], dim=1), values["x0"], u, values["noise"]
        )
        for gamma in (None, 5.0)
    )
    for part in ("mse", "vb"):
        assert torch.equal(plain.parts[part], weighted.parts[part])
    torch.testing.assert_close(weighted.loss, plain.parts["mse"] * expected.float() + plain.parts["vb"])


def test_an_evaluation_is_at_the_middles_of_equal_shares():
    assert bucket_draws(4).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("edm", {}, "unknown objective 'edm': choose from iddpm, rectified-flow"),
        ("iddpm", {"flow_times": "uniform"}, "flow_times=uniform does nothing with objective=iddpm"),
        ("iddpm", {"flow_shift": False}, "flow_shift=False does nothing with objective=iddpm"),
        ("rectified-flow", {"min_snr_gamma": 5.0}, "min_snr_gamma=5.0 does nothing with objective=rectified-flow"),
    ],
)
def test_settings_that_an_objective_does_not_have_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        create_objective(name, model="m", spatial_stride=8, **settings)


def test_a_model_has_its_published_objective_unless_another_is_asked_for():
    def name(asked, model):
        return create_objective(asked, model=model, spatial_stride=8).name

    assert name(None, "stdit3-xl/2") == name("rectified-flow", "stdit-xl/2") == "rectified-flow"
    assert name(None, "stdit-xl/2") == name(None, "dit-xl/2") == name("iddpm", "stdit3-xl/2") == "iddpm"


def test_a_step_on_a_device_copies_nothing_to_it_again(monkeypatch):
    """The schedule goes to a device once; the tables of a step are made there."""
    objective = create_objective("iddpm", model="m", spatial_stride=8)
    meta = torch.device("meta")
    x0, noise = torch.empty(SHAPE, device=meta), torch.empty(SHAPE, device=meta)
    u = torch.empty(4, dtype=torch.float64, device=meta)

    def denoise(x, timestep):
        assert timestep.device == meta
        return torch.cat([x, x], dim=1)

    assert objective.loss(denoise, x0, u, noise).loss.device == meta
    copies = []
    plain = torch.Tensor.to

    def counted(tensor, *args, **named):
        moved = plain(tensor, *args, **named)
        if moved.device != tensor.device:
            copies.append(tensor.shape)
        return moved

    monkeypatch.setattr(torch.Tensor, "to", counted)
    objective.loss(denoise, x0, u, noise)
    assert copies == []
