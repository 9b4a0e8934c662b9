# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""Improved DDPM: linear betas, noise prediction, learned-range variance, MSE + variational bound.

Source: Nichol and Dhariwal, arXiv 2102.09672, and the published improved-diffusion code, whose ``LossType.MSE`` with
learned variances Open-Sora v1.0 uses: the bound in bits a dimension is added to the MSE as it is. (The rescaled variant
multiplies it by num_timesteps / 1000, which is 1 here.) Written from the formulas; schedules are kept in float64.

Letters: N noise levels, B batch, C channels, T frames, H and W rows and columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.errors import InputError
from train.diffusion.terms import Denoiser, GivenFrames, LossTerms, per_frame, sample_means

NUM_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """Noise levels, least noisy first. What follows from them is computed once."""

    betas: Float[Tensor, " N"]
    """Variance added at each level, float64."""
    timesteps: Int[Tensor, " N"]
    """What the model is told at each level: 0 .. 999."""

    @property
    def num_steps(self) -> int:
        """The number of levels."""
        return len(self.betas)

    @cached_property
    def alpha_bars(self) -> Float[Tensor, " N"]:
        """The share of the signal's variance that is left at each level."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def previous_alpha_bars(self) -> Float[Tensor, " N"]:
        """``alpha_bars`` one level earlier, 1 before the first."""
        return torch.cat([self.betas.new_ones(1), self.alpha_bars[:-1]])

    @cached_property
    def posterior_variances(self) -> Float[Tensor, " N"]:
        """The variance of q(x_{t-1} | x_t, x_0); 0 at the first level."""
        return self.betas * (1 - self.previous_alpha_bars) / (1 - self.alpha_bars)

    @cached_property
    def log_variance_range(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest log variance that the model can name: the posterior's and beta.

        The first posterior variance is 0; the second stands in for it.
        """
        posterior = self.posterior_variances
        least = torch.cat([posterior[1:2], posterior[1:]]) if self.num_steps > 1 else self.betas
        return least.log(), self.betas.log()

    def to(self, device: torch.device) -> "Schedule":
        """Returns the schedule on a device, so that no step of training waits for a copy."""
        return Schedule(betas=self.betas.to(device), timesteps=self.timesteps.to(device))


def linear_schedule(num_steps: int = NUM_TIMESTEPS) -> Schedule:
    """Returns the training schedule: betas from 1e-4 to 2e-2."""
    return Schedule(betas=torch.linspace(1e-4, 2e-2, num_steps, dtype=torch.float64), timesteps=torch.arange(num_steps))


def respace(schedule: Schedule, num_steps: int, *, trailing: bool = False) -> Schedule:
    """Returns a schedule of ``num_steps`` levels of ``schedule``, evenly spaced.

    The betas are such that the kept levels have the signal shares that they had.

    Args:
        schedule: Of training.
        num_steps: Levels to keep.
        trailing: Keep the last level of each of as many equal parts; otherwise the first and the last of all, and
            those between, as published. Solvers of second order need it: from a level that is nearly clean they would
            have to extrapolate over the longest step of all (see docs/diffusion.md).

    Raises:
        InputError: if ``num_steps`` is not from 1 to the schedule's number of levels.
    """
    if not 1 <= num_steps <= schedule.num_steps:
        raise InputError(f"{num_steps} sampling steps: expected 1 to {schedule.num_steps}")
    if trailing:
        kept = torch.tensor([round(schedule.num_steps * (i + 1) / num_steps) - 1 for i in range(num_steps)])
    else:
        stride = (schedule.num_steps - 1) / (num_steps - 1) if num_steps > 1 else 0.0
        kept = torch.tensor([round(stride * i) for i in range(num_steps)])
    alpha_bars = schedule.alpha_bars[kept]
    previous = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return Schedule(betas=1 - alpha_bars / previous, timesteps=schedule.timesteps[kept])


def _at(values: Tensor, level: Tensor, like: Tensor) -> Tensor:
    """Returns the values at each sample's level in ``like``'s dtype, shaped to broadcast over it."""
    return values.to(like.device)[level].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(
    schedule: Schedule, x0: Float[Tensor, "B C T H W"], level: Int[Tensor, " B"], noise: Float[Tensor, "B C T H W"]
) -> Float[Tensor, "B C T H W"]:
    """Returns x_t, a draw of q(x_t | x_0)."""
    alpha_bar = schedule.alpha_bars
    return _at(alpha_bar.sqrt(), level, x0) * x0 + _at((1 - alpha_bar).sqrt(), level, x0) * noise


def predict_x0(
    schedule: Schedule, x_t: Float[Tensor, "B C T H W"], level: Int[Tensor, " B"], noise: Float[Tensor, "B C T H W"]
) -> Float[Tensor, "B C T H W"]:
    """Returns the x_0 from which ``noise`` leads to ``x_t``."""
    alpha_bar = schedule.alpha_bars
    return _at(alpha_bar.rsqrt(), level, x_t) * x_t - _at((1 / alpha_bar - 1).sqrt(), level, x_t) * noise


def posterior_mean(
    schedule: Schedule, x0: Float[Tensor, "B C T H W"], x_t: Float[Tensor, "B C T H W"], level: Int[Tensor, " B"]
) -> Float[Tensor, "B C T H W"]:
    """Returns the mean of q(x_{t-1} | x_t, x_0)."""
    betas, alpha_bar, previous = schedule.betas, schedule.alpha_bars, schedule.previous_alpha_bars
    from_x0 = betas * previous.sqrt() / (1 - alpha_bar)
    from_x_t = (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)
    return _at(from_x0, level, x0) * x0 + _at(from_x_t, level, x0) * x_t


def learned_log_variance(
    schedule: Schedule, place: Float[Tensor, "B C T H W"], level: Int[Tensor, " B"]
) -> Float[Tensor, "B C T H W"]:
    """Returns the log variance at ``place`` (-1 .. 1, not clipped) between the posterior's and beta."""
    least, greatest = (_at(bound, level, place) for bound in schedule.log_variance_range)
    share = (place + 1) / 2
    return share * greatest + (1 - share) * least


def min_snr_weights(schedule: Schedule, level: Int[Tensor, " B"], gamma: float) -> Float[Tensor, " B"]:
    """Returns min(SNR, gamma) / SNR, float64: weights of the noise's error that leave easy levels less to say.

    The ratio of signal to noise is alpha_bar / (1 - alpha_bar). To weigh the error of x_0 by min(SNR, gamma) is to
    weigh that of the noise by this. Source: Hang et al., arXiv 2303.09556, section 3.4.
    """
    alpha_bar = schedule.alpha_bars.to(level.device)[level]
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / snr


def training_loss(
    schedule: Schedule,
    denoiser: Denoiser,
    x0: Float[Tensor, "B C T H W"],
    level: Int[Tensor, " B"],
    noise: Float[Tensor, "B C T H W"],
    *,
    frame_mask: Bool[Tensor, "B T"] | None = None,
    min_snr_gamma: float | None = None,
) -> LossTerms:
    """Returns the hybrid loss of each sample, in float32: ``mse``, of the noise, and ``vb``, the variational bound's
    term at the sample's level in bits a dimension. The loss is their sum, the first weighted if a gamma is given.

    Args:
        schedule: Of training.
        denoiser: The model, with its conditions: gives the noise, then the variance's place in its range.
        x0: Latents, float32.
        level: The noise level of each sample.
        noise: Standard normal, float32.
        frame_mask: False at frames that are given: they get no noise and count in no loss. Every sample has one True.
        min_snr_gamma: See :func:`min_snr_weights`; None is no weighting.
    """
    x_t = add_noise(schedule, x0, level, noise)
    if frame_mask is not None:
        x_t = torch.where(per_frame(frame_mask), x_t, x0)
    predicted_noise, place = denoiser(x_t, schedule.timesteps.to(level.device)[level].float()).chunk(2, dim=1)
    mse = sample_means((predicted_noise - noise).square(), frame_mask)
    # Detached, so that the bound teaches the variance and leaves the mean to the MSE.
    vb = sample_means(bound_bits(schedule, x0, x_t, level, predicted_noise.detach(), place), frame_mask)
    weighted = mse if min_snr_gamma is None else mse * min_snr_weights(schedule, level, min_snr_gamma).to(mse.dtype)
    return LossTerms(loss=weighted + vb, parts={"mse": mse, "vb": vb})


def bound_bits(
    schedule: Schedule,
    x0: Float[Tensor, "B C T H W"],
    x_t: Float[Tensor, "B C T H W"],
    level: Int[Tensor, " B"],
    predicted_noise: Float[Tensor, "B C T H W"],
    place: Float[Tensor, "B C T H W"],
) -> Float[Tensor, "B C T H W"]:
    """Returns the bound's term of each value in bits: a KL divergence, at level 0 the decoder's NLL."""
    log_variance = learned_log_variance(schedule, place, level)
    mean = posterior_mean(schedule, predict_x0(schedule, x_t, level, predicted_noise), x_t, level)
    true_mean = posterior_mean(schedule, x0, x_t, level)
    true_log_variance = _at(schedule.log_variance_range[0], level, x0)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    nll = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    first = (level == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(first, nll, kl) / math.log(2)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Returns log P(x) under a Gaussian summed over bins of 2 / 255, as for images scaled to -1 .. 1.

    Latents are not such images; upstream uses the bins all the same, and the loss is to be comparable.
    """
    inverse_scale = (-log_scale).exp()
    below = _normal_cdf(inverse_scale * (x - mean - 1 / 255))
    above = _normal_cdf(inverse_scale * (x - mean + 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Returns the approximation of the normal distribution function that upstream uses (tanh, error below 3e-4)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def ancestral_step(
    schedule: Schedule,
    prediction: Float[Tensor, "B 2C T H W"],
    x_t: Float[Tensor, "B C T H W"],
    level: Int[Tensor, " B"],
    noise: Float[Tensor, "B C T H W"],
) -> Float[Tensor, "B C T H W"]:
    """Returns x_{t-1}, a draw of the model's reverse process; at level 0 its mean."""
    predicted_noise, place = prediction.chunk(2, dim=1)
    mean = posterior_mean(schedule, predict_x0(schedule, x_t, level, predicted_noise), x_t, level)
    spread = (0.5 * learned_log_variance(schedule, place, level)).exp()
    later: Bool[Tensor, "B 1 1 1 1"] = (level > 0).view(-1, *[1] * (x_t.ndim - 1))
    return mean + later * spread * noise


@torch.no_grad()
def sample(
    schedule: Schedule,
    denoiser: Denoiser,
    x: Float[Tensor, "B C T H W"],
    draw_noise: Callable[[], Float[Tensor, "B C T H W"]],
    given: GivenFrames | None = None,
) -> Float[Tensor, "B C T H W"]:
    """Returns x_0 from pure noise, level by level.

    Args:
        schedule: Usually respaced.
        denoiser: The model, with its conditions and guidance.
        x: Standard normal.
        draw_noise: Gives the noise of one step, shaped as x.
        given: Frames to keep; the model is told of them.
    """
    x = x if given is None else given.kept_in(x)
    for index in reversed(range(schedule.num_steps)):
        level = torch.full((x.shape[0],), index, device=x.device)
        prediction = denoiser(x, schedule.timesteps[index].float().expand(x.shape[0]).to(x.device))
        x = ancestral_step(schedule, prediction, x, level, draw_noise())
        x = x if given is None else given.kept_in(x)
    return x
