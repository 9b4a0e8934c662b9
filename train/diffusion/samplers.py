# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""From noise to latents: the samplers by name, and which objective each belongs to.

DDIM and DPM-Solver++ are diffusers' own, over the schedule that IDDPM was respaced to: they are given its betas, so
that their levels are ours for any number of steps. They leave the learned variance unused.

Letters: B batch, C channels, T frames, H and W rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from shared.errors import InputError
from train.diffusion import iddpm, rectified_flow
from train.diffusion.iddpm import Schedule
from train.diffusion.objective import Iddpm, Objective, ObjectiveName, RectifiedFlow
from train.diffusion.terms import Denoiser, GivenFrames

SamplerName = Literal["ancestral", "ddim", "dpm++", "euler"]
DrawNoise = Callable[[], Tensor]

_OBJECTIVES: dict[SamplerName, ObjectiveName] = {
    "ancestral": "iddpm",
    "ddim": "iddpm",
    "dpm++": "iddpm",
    "euler": "rectified-flow",
}
_DEFAULT_STEPS: dict[SamplerName, int] = {"ancestral": 100, "ddim": 50, "dpm++": 20, "euler": 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A way from noise to latents. Made by :func:`create_sampler`."""

    name: SamplerName
    num_steps: int
    objective: Objective
    """What the model was trained for."""

    def sample(
        self,
        denoise: Denoiser,
        x: Float[Tensor, "B C T H W"],
        draw_noise: DrawNoise,
        given: GivenFrames | None = None,
    ) -> Float[Tensor, "B C T H W"]:
        """Returns clean latents.

        Args:
            denoise: The model, with its conditions and guidance; the mask of ``given`` is to be among them.
            x: Standard normal, float32.
            draw_noise: Gives noise shaped as x; the ancestral sampler takes some each step, the others none.
            given: Frames to keep.
        """
        if isinstance(self.objective, RectifiedFlow):
            frames, rows, columns = x.shape[2:]
            times = rectified_flow.sampling_times(self.num_steps, self.objective.ratio((frames, rows, columns)))
            return rectified_flow.sample_euler(times, denoise, x, given)
        assert isinstance(self.objective, Iddpm)
        if self.name == "ancestral":
            schedule = iddpm.respace(self.objective.schedule, self.num_steps)
            return iddpm.sample(schedule, denoise, x, draw_noise, given)
        schedule = iddpm.respace(self.objective.schedule, self.num_steps, trailing=True)
        return _sample_by_diffusers(self.name, schedule, denoise, x, given)


def create_sampler(name: SamplerName | None, num_steps: int | None, objective: Objective) -> Sampler:
    """Returns a sampler for a model.

    Args:
        name: None takes the published one: ancestral for IDDPM, Euler for rectified flow.
        num_steps: Of the sampler; None takes the usual number.
        objective: What the model was trained for.

    Raises:
        InputError: if the sampler does not belong to the objective, or cannot take so many steps.
    """
    fitting = [sampler for sampler in get_args(SamplerName) if _OBJECTIVES[sampler] == objective.name]
    name = name or fitting[0]
    if name not in fitting:
        raise InputError(f"sampler {name!r}: the model was trained for {objective.name}: use {' or '.join(fitting)}")
    num_steps = _DEFAULT_STEPS[name] if num_steps is None else num_steps
    if isinstance(objective, Iddpm):
        iddpm.respace(objective.schedule, num_steps)  # refuses what cannot be
    else:
        rectified_flow.sampling_times(num_steps)
    return Sampler(name=name, num_steps=num_steps, objective=objective)


@torch.no_grad()
def _sample_by_diffusers(
    name: SamplerName, schedule: Schedule, denoise: Denoiser, x: Tensor, given: GivenFrames | None
) -> Tensor:
    scheduler = _diffusers_scheduler(name, schedule)
    scheduler.set_timesteps(schedule.num_steps, device=x.device)
    assert scheduler.timesteps.tolist() == list(reversed(range(schedule.num_steps))), scheduler.timesteps
    x = x if given is None else given.kept_in(x)
    for level in scheduler.timesteps:
        told = schedule.timesteps[int(level)].float().expand(x.shape[0]).to(x.device)
        noise = denoise(x, told)[:, : x.shape[1]]
        x = scheduler.step(noise, level, x).prev_sample
        x = x if given is None else given.kept_in(x)
    return x


def _diffusers_scheduler(name: SamplerName, schedule: Schedule) -> Any:
    """Returns diffusers' scheduler whose levels are exactly those of ``schedule``."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler  # takes a second: not for --help

    settings: dict[str, Any] = {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",  # with as many steps as levels: each level once
    }
    if name == "ddim":
        return DDIMScheduler(**settings, clip_sample=False)
    return DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++", solver_order=2)
