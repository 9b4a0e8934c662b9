# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""What a model is trained for, behind one interface: from latents, uniform draws and noise to the loss of each sample.

An objective draws nothing. It maps each sample's uniform number to a noise level, so that the numbers can be drawn
where samples are (``train/draws.py``) without knowing the objective.

Letters: B batch, C channels, T frames, H and W rows and columns.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.errors import InputError
from train.diffusion import iddpm, rectified_flow
from train.diffusion.iddpm import Schedule
from train.diffusion.rectified_flow import TimeDistribution
from train.diffusion.terms import Denoiser, LossTerms

ObjectiveName = Literal["iddpm", "rectified-flow"]


class Objective(Protocol):
    """What the trainer and the evaluation know of a diffusion process."""

    @property
    def name(self) -> ObjectiveName:
        """As :func:`create_objective` takes it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the losses' parts, in their order."""

    @property
    def learns_variance(self) -> bool:
        """Whether the model must have output channels for the variance."""

    def timesteps(self, u: Float[Tensor, " B"], size: tuple[int, int, int]) -> Float[Tensor, " B"]:
        """Returns what the model is told, from 0 (clean) to 1000, at uniform draws.

        Args:
            u: From [0, 1), float64: the share of training that is less noisy, before any shift by size.
            size: Latent frames, rows and columns.
        """

    def loss(
        self,
        denoise: Denoiser,
        x0: Float[Tensor, "B C T H W"],
        u: Float[Tensor, " B"],
        noise: Float[Tensor, "B C T H W"],
        *,
        frame_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LossTerms:
        """Returns the loss of each sample, in float32.

        Args:
            denoise: The model, with its conditions; it is called once. ``frame_mask`` is to be among them.
            x0: Latents, float32.
            u: Each sample's draw from [0, 1), float64.
            noise: Standard normal, float32.
            frame_mask: False at frames that are given: they get no noise and count in no loss. Every sample has one
                True at least. None: all frames are made.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Iddpm:
    """:mod:`train.diffusion.iddpm` as an objective."""

    schedule: Schedule
    """Of training."""
    min_snr_gamma: float | None = None
    """See :func:`train.diffusion.iddpm.min_snr_weights`; None weighs all levels alike, as published."""
    _by_device: dict[torch.device, Schedule] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[ObjectiveName] = "iddpm"
    parts: ClassVar[tuple[str, ...]] = ("mse", "vb")
    learns_variance: ClassVar[bool] = True

    def levels(self, u: Float[Tensor, " B"]) -> Tensor:
        """Returns the noise level of each draw, (B,) int64."""
        return (u * self.schedule.num_steps).long()

    def timesteps(self, u: Float[Tensor, " B"], size: tuple[int, int, int]) -> Float[Tensor, " B"]:
        return self._on(u.device).timesteps[self.levels(u)].float()

    def _on(self, device: torch.device) -> Schedule:
        """Returns the schedule on a device, copied there once: a copy would wait for all that the device has to do."""
        if device not in self._by_device:
            self._by_device[device] = self.schedule.to(device)
        return self._by_device[device]

    def loss(
        self,
        denoise: Denoiser,
        x0: Float[Tensor, "B C T H W"],
        u: Float[Tensor, " B"],
        noise: Float[Tensor, "B C T H W"],
        *,
        frame_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LossTerms:
        return iddpm.training_loss(
            self._on(x0.device),
            denoise,
            x0,
            self.levels(u),
            noise,
            frame_mask=frame_mask,
            min_snr_gamma=self.min_snr_gamma,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedFlow:
    """:mod:`train.diffusion.rectified_flow` as an objective."""

    spatial_stride: int
    """Pixels of a latent's row or column."""
    times: TimeDistribution = "logit-normal"
    """How times are distributed before they are shifted."""
    shift: bool = True
    """Shift times with the size of a clip."""

    name: ClassVar[ObjectiveName] = "rectified-flow"
    parts: ClassVar[tuple[str, ...]] = ("mse",)
    learns_variance: ClassVar[bool] = False

    def ratio(self, size: tuple[int, int, int]) -> float:
        """Returns the shift's ratio for latents of ``size`` frames, rows and columns."""
        frames, rows, columns = size
        return rectified_flow.shift_ratio(rows * columns * self.spatial_stride**2, frames) if self.shift else 1.0

    def flow_times(self, u: Float[Tensor, " B"], size: tuple[int, int, int]) -> Float[Tensor, " B"]:
        """Returns the time of each draw, 0 to 1, float64."""
        return rectified_flow.shift_times(rectified_flow.times_at(u, self.times), self.ratio(size))

    def timesteps(self, u: Float[Tensor, " B"], size: tuple[int, int, int]) -> Float[Tensor, " B"]:
        return (rectified_flow.MODEL_TIMESCALE * self.flow_times(u, size)).float()

    def loss(
        self,
        denoise: Denoiser,
        x0: Float[Tensor, "B C T H W"],
        u: Float[Tensor, " B"],
        noise: Float[Tensor, "B C T H W"],
        *,
        frame_mask: Bool[Tensor, "B T"] | None = None,
    ) -> LossTerms:
        frames, rows, columns = x0.shape[2:]
        time = self.flow_times(u, (frames, rows, columns))
        return rectified_flow.training_loss(denoise, x0, time, noise, frame_mask)


def create_objective(
    name: ObjectiveName | None,
    *,
    model: str,
    spatial_stride: int,
    min_snr_gamma: float | None = None,
    flow_times: TimeDistribution | None = None,
    flow_shift: bool | None = None,
) -> Objective:
    """Returns an objective by name.

    Args:
        name: None takes what the model was published with: rectified flow for ``stdit3-*``, IDDPM for others.
        model: The model's name.
        spatial_stride: Pixels of a latent's row or column.
        min_snr_gamma: For IDDPM: see :func:`train.diffusion.iddpm.min_snr_weights`; None is no weighting.
        flow_times: For rectified flow: ``logit-normal`` (None) or ``uniform``.
        flow_shift: For rectified flow: whether times are shifted with the size of a clip; None is True.

    Raises:
        InputError: for an unknown name, or a setting that the objective does not have.
    """
    name = choose_objective(name, model, min_snr_gamma=min_snr_gamma, flow_times=flow_times, flow_shift=flow_shift)
    if name == "iddpm":
        return Iddpm(schedule=iddpm.linear_schedule(), min_snr_gamma=min_snr_gamma)
    shift = True if flow_shift is None else flow_shift
    return RectifiedFlow(spatial_stride=spatial_stride, times=flow_times or "logit-normal", shift=shift)


def choose_objective(
    name: ObjectiveName | None,
    model: str,
    *,
    min_snr_gamma: float | None,
    flow_times: TimeDistribution | None,
    flow_shift: bool | None,
) -> ObjectiveName:
    """Returns the name of the objective that :func:`create_objective` makes of the same arguments.

    Raises:
        InputError: as it does.
    """
    name = name or ("rectified-flow" if model.startswith("stdit3") else "iddpm")
    if name == "iddpm":
        _refuse(name, flow_times=flow_times, flow_shift=flow_shift)
    elif name == "rectified-flow":
        _refuse(name, min_snr_gamma=min_snr_gamma)
    else:
        raise InputError(f"unknown objective {name!r}: choose from {', '.join(get_args(ObjectiveName))}")
    return name


def _refuse(name: str, **settings: object) -> None:
    for setting, value in settings.items():
        if value is not None:
            raise InputError(f"{setting}={value} does nothing with objective={name}: leave it out")


def bucket_draws(num_buckets: int) -> Float[Tensor, " N"]:
    """Returns the draws in the middle of ``num_buckets`` equal shares of training, from the least noisy on, float64."""
    return (torch.arange(num_buckets, dtype=torch.float64) + 0.5) / num_buckets
