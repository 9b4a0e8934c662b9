"""Samplers by name, against closed forms."""

import math

import pytest
import torch

from shared.errors import InputError
from train.diffusion import iddpm
from train.diffusion.guidance import guided
from train.diffusion.objective import create_objective
from train.diffusion.samplers import create_sampler
from train.diffusion.terms import GivenFrames

SHAPE = (2, 2, 3, 4, 4)


def objective(name):
    return create_objective(name, model="m", spatial_stride=8)


def draw(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}


def no_noise():
    raise AssertionError("this sampler takes no noise")


def share(timestep: torch.Tensor) -> torch.Tensor:
    """alpha_bar at a timestep of training."""
    return iddpm.linear_schedule().alpha_bars[timestep.long()].view(-1, 1, 1, 1, 1)


def oracle(x0):
    """A model that knows x0: its noise, then a channel for the variance that nobody may use."""

    def denoise(x, timestep):
        noise = (x - share(timestep).sqrt() * x0) / (1 - share(timestep)).sqrt()
        return torch.cat([noise, torch.full_like(noise, math.nan)], dim=1)

    return denoise


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_diffusers_samplers_with_a_model_that_knows_the_answer_give_the_answer(name, steps):
    values = draw("x0", "x")
    sampler = create_sampler(name, steps, objective("iddpm"))
    found = sampler.sample(oracle(values["x0"]), values["x"], no_noise)
    torch.testing.assert_close(found, values["x0"], atol=2e-3, rtol=0)


def shrinking(x, timestep):
    """The model of a data set of normal numbers of deviation 0.5: the noise that is to be expected."""
    variance = 0.25 * share(timestep) + 1 - share(timestep)
    return torch.cat([x * (1 - share(timestep)).sqrt() / variance, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("steps", [2, 6, 50])
def test_ddim_takes_the_steps_of_its_formula(steps):
    """Equation 12 of arXiv 2010.02502 with sigma 0, over the respaced levels."""
    x = draw("x")["x"]
    found = create_sampler("ddim", steps, objective("iddpm")).sample(shrinking, x, no_noise)
    kept = iddpm.respace(iddpm.linear_schedule(), steps, trailing=True).timesteps.flip(0)
    for now, later in zip(kept, [*kept[1:], None], strict=True):
        at = share(now[None])
        after = torch.ones_like(at) if later is None else share(later[None])
        noise = shrinking(x, now[None].expand(2))[:, :2]
        x = after.sqrt() * (x - (1 - at).sqrt() * noise) / at.sqrt() + (1 - after).sqrt() * noise
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-4)


def test_with_many_steps_ddim_and_dpm_find_the_deviation_of_the_data():
    """The way of the probability flow of normal data is known: it scales x by the deviation."""
    x = draw("x")["x"]
    start = share(torch.tensor([999]))
    expected = x * 0.5 / (0.25 * start + 1 - start).sqrt()
    errors = {}
    for name, steps in (("ddim", 20), ("ddim", 40), ("dpm++", 20), ("dpm++", 40)):
        found = create_sampler(name, steps, objective("iddpm")).sample(shrinking, x, no_noise)
        errors[name, steps] = ((found - expected).norm() / expected.norm()).item()
    assert errors["ddim", 40] < 0.55 * errors["ddim", 20] < 0.1  # of first order
    assert errors["dpm++", 40] < 0.3 * errors["dpm++", 20] < 0.02  # of second


@pytest.mark.parametrize(
    ("name", "process"), [("ancestral", "iddpm"), ("ddim", "iddpm"), ("dpm++", "iddpm"), ("euler", "rectified-flow")]
)
def test_given_frames_are_kept_at_every_step_and_at_the_end(name, process):
    values = draw("x", "given")
    mask = torch.tensor([[False, True, True], [True, True, False]])
    given = GivenFrames(latents=values["given"], frame_mask=mask)
    seen = []

    def denoise(x, timestep):
        seen.append(x)
        return torch.cat([x, torch.zeros_like(x)], dim=1)

    sampler = create_sampler(name, 4, objective(process))
    found = sampler.sample(denoise, values["x"], lambda: torch.ones_like(values["x"]), given)
    assert len(seen) == 4
    for x in (*seen, found):
        assert torch.equal(x[0, :, 0], values["given"][0, :, 0])
        assert torch.equal(x[1, :, 2], values["given"][1, :, 2])
        assert not torch.isclose(x[:, :, 1], values["given"][:, :, 1]).any()
    assert torch.equal(seen[0][:, :, 1], values["x"][:, :, 1])


def test_euler_shifts_its_times_by_the_size_of_the_clip():
    seen = []

    def denoise(x, timestep):
        seen.append(timestep[0].item())
        return x

    create_sampler("euler", 2, objective("rectified-flow")).sample(denoise, draw("x")["x"], no_noise)
    ratio = math.sqrt(32 * 32 / 512**2) * math.sqrt(3)
    assert seen == pytest.approx([1000, 1000 * ratio * 0.5 / (1 + (ratio - 1) * 0.5)])


def test_samplers_that_do_not_fit_the_objective_are_refused():
    assert create_sampler(None, None, objective("iddpm")).name == "ancestral"
    assert create_sampler(None, None, objective("iddpm")).num_steps == 100
    assert create_sampler(None, None, objective("rectified-flow")).num_steps == 30
    for name, process, steps, message in [
        ("euler", "iddpm", 5, "sampler 'euler': the model was trained for iddpm: use ancestral or ddim or dpm++"),
        ("ddim", "rectified-flow", 5, "sampler 'ddim': the model was trained for rectified-flow: use euler"),
        ("ddim", "iddpm", 1001, "1001 sampling steps: expected 1 to 1000"),
        ("euler", "rectified-flow", 0, "0 sampling steps: expected at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            create_sampler(name, steps, objective(process))


def test_guidance_moves_all_latent_channels_or_only_the_first():
    conditional, unconditional = torch.full((1, 8, 1, 1, 1), 2.0), torch.ones(1, 8, 1, 1, 1)
    assert guided(conditional, unconditional, 7.0, 4).flatten().tolist() == [8.0] * 4 + [2.0] * 4
    assert guided(conditional, unconditional, 7.0, 4, 3).flatten().tolist() == [8.0] * 3 + [2.0] * 5
    assert guided(conditional, unconditional, 7.0, 8).flatten().tolist() == [8.0] * 8  # no channels for the variance
    with pytest.raises(InputError, match="guidance_channels=5: expected 1 to 4"):
        guided(conditional, unconditional, 7.0, 4, 5)
