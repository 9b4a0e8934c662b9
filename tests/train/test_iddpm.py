"""The diffusion process against formulas written down independently, and against diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from shared.errors import InputError
from train.diffusion import iddpm
from train.diffusion.terms import Denoiser

SHAPE = (3, 2, 2, 4, 4)


@pytest.fixture
def schedule():
    return iddpm.linear_schedule()


def draw(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(SHAPE, generator=generator, dtype=torch.float64) for name in names}


def test_the_posterior_is_the_gaussian_that_bayes_rule_gives(schedule):
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians, in numpy."""
    values = draw("x0", "x_t")
    level = torch.tensor([1, 400, 999])
    betas = np.linspace(1e-4, 2e-2, 1000)
    for row, t in enumerate(level.tolist()):
        before = np.prod(1 - betas[:t])
        precision = (1 - betas[t]) / betas[t] + 1 / (1 - before)
        x0, x_t = values["x0"][row].numpy(), values["x_t"][row].numpy()
        mean = (math.sqrt(1 - betas[t]) * x_t / betas[t] + math.sqrt(before) * x0 / (1 - before)) / precision
        found = iddpm.posterior_mean(schedule, values["x0"], values["x_t"], level)[row].numpy()
        np.testing.assert_allclose(found, mean, rtol=1e-9)
        np.testing.assert_allclose(schedule.posterior_variances[t], 1 / precision, rtol=1e-9)


def test_noise_is_added_as_by_diffusers_and_predicted_back(schedule):
    values = draw("x0", "noise")
    level = torch.tensor([0, 500, 999])
    x_t = iddpm.add_noise(schedule, values["x0"], level, values["noise"])
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=2e-2).add_noise(values["x0"], values["noise"], level)
    torch.testing.assert_close(x_t, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iddpm.predict_x0(schedule, x_t, level, values["noise"]), values["x0"])


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_a_step_is_that_of_diffusers(schedule, t):
    values = draw("x_t", "eps")
    place = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=False, prediction_type="epsilon"
    )
    prediction = torch.cat([values["eps"], place], dim=1)
    theirs = scheduler.step(prediction, t, values["x_t"], generator=torch.Generator().manual_seed(3)).prev_sample
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = iddpm.ancestral_step(schedule, prediction, values["x_t"], torch.full((3,), t), noise)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_respaced_levels_keep_their_signal_shares(schedule):
    respaced = iddpm.respace(schedule, 100)
    assert respaced.timesteps[[0, -1]].tolist() == [0, 999]
    assert respaced.num_steps == len(set(respaced.timesteps.tolist())) == 100
    torch.testing.assert_close(respaced.alpha_bars, schedule.alpha_bars[respaced.timesteps])
    torch.testing.assert_close(iddpm.respace(schedule, 1000).betas, schedule.betas)
    trailing = iddpm.respace(schedule, 30, trailing=True)
    assert trailing.timesteps[[0, 1, -1]].tolist() == [32, 66, 999]
    torch.testing.assert_close(trailing.alpha_bars, schedule.alpha_bars[trailing.timesteps])
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"{steps} sampling steps: expected 1 to 1000"):
            iddpm.respace(schedule, steps)


def oracle(x0: torch.Tensor, schedule: iddpm.Schedule) -> Denoiser:
    """A model that knows x0."""

    def denoise(x, timestep):
        share = schedule.alpha_bars[timestep.long()].to(x.dtype).view(-1, 1, 1, 1, 1)
        noise = (x - share.sqrt() * x0) / (1 - share).sqrt()
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)

    return denoise


@pytest.mark.parametrize("steps", [1, 20, 100, 1000])
def test_sampling_with_a_model_that_knows_the_answer_gives_the_answer(schedule, steps):
    values = draw("x0", "x")
    generator = torch.Generator().manual_seed(0)
    found = iddpm.sample(
        iddpm.respace(schedule, steps),
        oracle(values["x0"], schedule),
        values["x"],
        lambda: torch.randn(SHAPE, generator=generator, dtype=torch.float64),
    )
    torch.testing.assert_close(found, values["x0"], atol=1e-6, rtol=1e-6)


def test_the_bound_is_zero_where_the_model_is_the_posterior(schedule):
    values = draw("x0", "noise")
    level = torch.tensor([1, 300, 999])
    terms = iddpm.training_loss(schedule, oracle(values["x0"], schedule), values["x0"], level, values["noise"])
    torch.testing.assert_close(terms.parts["mse"], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(terms.parts["vb"], torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)


def test_the_bound_is_the_kl_divergence_of_torch_distributions_in_bits(schedule):
    values = draw("x0", "noise", "eps", "place")
    level = torch.tensor([2, 300, 999])
    x_t = iddpm.add_noise(schedule, values["x0"], level, values["noise"])
    found = iddpm.bound_bits(schedule, values["x0"], x_t, level, values["eps"], values["place"]).flatten(1).mean(1)
    for row, t in enumerate(level.tolist()):
        true_variance, beta = schedule.posterior_variances[t], schedule.betas[t]
        share = (values["place"][row] + 1) / 2
        one = torch.tensor([t])
        guess = iddpm.predict_x0(schedule, x_t[row : row + 1], one, values["eps"][row : row + 1])
        means = [iddpm.posterior_mean(schedule, x, x_t[row : row + 1], one)[0] for x in (values["x0"][[row]], guess)]
        true = torch.distributions.Normal(means[0], true_variance.sqrt())
        model = torch.distributions.Normal(means[1], (beta**share * true_variance ** (1 - share)).sqrt())
        expected = torch.distributions.kl_divergence(true, model).mean() / math.log(2)
        torch.testing.assert_close(found[row], expected)


def test_at_the_first_level_the_bound_is_the_likelihood_of_the_bin(schedule):
    x0 = torch.linspace(-0.9, 0.9, 24, dtype=torch.float64).view(1, 2, 3, 2, 2)
    level, zero = torch.tensor([0]), torch.zeros(1, 2, 3, 2, 2, dtype=torch.float64)
    x_t = iddpm.add_noise(schedule, x0, level, zero)
    found = iddpm.bound_bits(schedule, x0, x_t, level, zero, zero + 1).flatten(1).mean(1)
    normal = torch.distributions.Normal(x0, schedule.betas[0].sqrt())
    probability = normal.cdf(x0 + 1 / 255) - normal.cdf(x0 - 1 / 255)
    torch.testing.assert_close(found[0], -probability.log2().mean(), atol=1e-3, rtol=1e-2)


def test_the_bound_teaches_the_variance_and_not_the_mean(schedule):
    values = draw("x0", "noise", "eps", "place")
    eps, place = values["eps"].requires_grad_(), values["place"].requires_grad_()
    terms = iddpm.training_loss(
        schedule, lambda x, t: torch.cat([eps, place], dim=1), values["x0"], torch.tensor([5, 300, 0]), values["noise"]
    )
    by_eps, by_place = torch.autograd.grad(terms.parts["vb"].sum(), [eps, place], allow_unused=True)
    assert by_eps is None or by_eps.abs().max() == 0
    assert by_place.abs().max() > 0
    torch.testing.assert_close(terms.loss, terms.parts["mse"] + terms.parts["vb"])
