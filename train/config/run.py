"""All options of a training run, and their flat form."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from shared.errors import InputError
from train.config.architecture import ArchitectureOptions
from train.config.checkpoints import CheckpointOptions
from train.config.data import DataOptions
from train.config.diffusion import DiffusionOptions
from train.config.evaluation import EvaluationOptions
from train.config.finetuning import FinetuningOptions
from train.config.log import LogOptions
from train.config.online import OnlineOptions
from train.config.optimiser import OptimiserOptions
from train.config.parallel import ParallelOptions
from train.config.presets import Preset
from train.config.settings import ADJUSTABLE, MAY_CHANGE, MayChange, require_at_least
from train.diffusion.objective import choose_objective


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Trains a video diffusion transformer from a cache. Run again with the same output, it goes on from there."""

    cache: MayChange[str | None] = None
    """The cache that preprocess made: a folder, or s3://bucket/prefix, gs://, az://. Or give --online."""
    output: MayChange[Path]
    """The run's folder: configuration, metrics, checkpoints."""
    preset: Preset | None = None
    """Options that repeat a published stage; --config and the command line go over them."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Options by name in a .json or .yaml file, or a run's run.json; the command line goes over them."""
    print_config: bool = False
    """Print all options as JSON, for --config, and stop."""
    dry_run: bool = False
    """Say what the run would do and take, its memory among it, and stop. Needs the cache, and no GPU."""
    plan_ranks: int | None = None
    """With --dry-run: for so many ranks; those that there are by default."""
    steps: MayChange[int] = 1000
    """Optimiser steps of the whole run."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and all noise."""
    debug: MayChange[bool] = False
    """Show the traceback of an error."""

    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    finetuning: FinetuningOptions = field(default_factory=FinetuningOptions)
    data: DataOptions = field(default_factory=DataOptions)
    encoding: OnlineOptions = field(default_factory=OnlineOptions)
    diffusion: DiffusionOptions = field(default_factory=DiffusionOptions)
    optimiser: OptimiserOptions = field(default_factory=OptimiserOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "plan_ranks")
        if self.plan_ranks is not None and not self.dry_run:
            raise InputError(f"plan_ranks={self.plan_ranks} does nothing without --dry-run")
        if self.evaluation.evaluate_every is not None and self.data.holdout is None:
            raise InputError("evaluate_every needs samples that are kept out of training: use --holdout, e.g. 1%")
        if self.evaluation.judge_ema and self.optimiser.ema_decay is None:
            raise InputError("judge_ema: there is no average with --ema-decay None: leave one of them out")
        require_at_least(self, 0, "seed")
        self._check_diffusion()
        parts = self.optimiser.gradient_accumulation
        if parts > 1 and self.parallel.zero_stage == 0 and self.parallel.precision == "bfloat16":
            raise InputError(
                f"gradient_accumulation={parts} would add gradients up in bfloat16 at zero_stage=0: use stage 1, or "
                "float32"
            )
        if parts > 1 and self.parallel.cuda_graphs:
            raise InputError(f"cuda_graphs does not go with gradient_accumulation={parts}: leave one of them out")
        if (self.cache is None) == (self.encoding.online is None):
            found = "neither" if self.cache is None else "both"
            raise InputError(f"--cache and --online: found {found}: expected one of them, the source of the batches")
        judged = self.evaluation
        if self.cache is None and judged.evaluate_every is not None:
            raise InputError("evaluate_every with --online: samples are held out of caches only: leave it out")
        if self.cache is None and judged.preview_every is not None and judged.preview_prompts is None:
            raise InputError("preview_every with --online: there is no cache to take captions from: --preview-prompts")
        if self.encoding.online is not None and self.data.num_workers == 0:
            raise InputError("num_workers=0 with --online: clips are decoded in processes of their own: use at least 1")
        if self.encoding.online is not None and self.data.local_cache_gb != DEFAULTS["local_cache_gb"]:
            raise InputError(
                f"local_cache_gb={self.data.local_cache_gb} does nothing with --online, of which --local-cache keeps "
                "the index alone: leave it out"
            )

    def _check_diffusion(self) -> None:
        diffusion, model, judged = self.diffusion, self.architecture.model, self.evaluation
        choose_objective(
            diffusion.objective,
            model,
            min_snr_gamma=diffusion.min_snr_gamma,
            flow_times=diffusion.flow_times,
            flow_shift=diffusion.flow_shift,
        )
        if diffusion.mask_ratios and not model.startswith("stdit3"):
            raise InputError(
                f"mask_ratios={' '.join(diffusion.mask_ratios)}: {model} cannot be told which frames are given: use a "
                "stdit3 model, or leave it out"
            )
        if judged.preview_every is not None and judged.preview_guidance != 1 and not diffusion.caption_dropout:
            raise InputError("caption_dropout=0 leaves the null caption untrained: use --preview-guidance 1")

    @property
    def decay_steps(self) -> int:
        """The step at which a falling learning rate reaches its end."""
        return self.steps if self.optimiser.decay_steps is None else self.optimiser.decay_steps

    @classmethod
    def of(cls, **values: Any) -> "TrainConfig":
        """Returns the configuration with ``values`` by option, whatever their groups; those of :meth:`to_json` too.

        Raises:
            InputError: for an unknown option, or values that do not fit.
        """
        own, by_group = _sort_by_group(values)
        return cls(**own, **{name: GROUPS[name](**options) for name, options in by_group.items()})

    def changed(self, **values: Any) -> "TrainConfig":
        """Returns the same configuration with other ``values`` by option, whatever their groups.

        Raises:
            InputError: for an unknown option, or values that do not fit.
        """
        own, by_group = _sort_by_group(values)
        groups = {name: dataclasses.replace(getattr(self, name), **options) for name, options in by_group.items()}
        return dataclasses.replace(self, **own, **groups)

    def values(self) -> dict[str, Any]:
        """Returns all options, flat."""
        return {name: getattr(self if group is None else getattr(self, group), name) for name, group in OPTIONS.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns all options, flat, as JSON values."""
        values = self.values()
        if self.optimiser.lr_schedule != "constant":  # so that a run which goes on for longer does not change it
            values["decay_steps"] = self.decay_steps
        return {name: _jsonable(values[name]) for name in OPTIONS if name not in NOT_SAVED}


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _from_json(name: str, value: Any) -> Any:
    """Returns an option's value, which may be as :func:`_jsonable` made it; no option is a list."""
    if isinstance(value, str) and name in _PATHS:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


NOT_SAVED = frozenset({"preset", "config", "print_config", "dry_run", "plan_ranks"})
"""Options that say where others come from, or what is done instead of training. They are no part of a run."""

GROUPS: dict[str, Any] = {
    name: kind for name, kind in typing.get_type_hints(TrainConfig).items() if dataclasses.is_dataclass(kind)
}
"""The groups of options, by name."""

OPTIONS: dict[str, str | None] = {
    option.name: None for option in dataclasses.fields(TrainConfig) if option.name not in GROUPS
} | {option.name: group for group, kind in GROUPS.items() for option in dataclasses.fields(kind)}
"""The group of each option; None for those of no group."""

TYPES: dict[str, Any] = {
    name: kind
    for owner in (TrainConfig, *GROUPS.values())
    for name, kind in typing.get_type_hints(owner, include_extras=True).items()
    if name not in GROUPS
}
"""The annotated type of each option."""

_PATHS = frozenset(name for name, kind in TYPES.items() if "pathlib.Path" in repr(kind))

assert (
    len(OPTIONS) == len(TYPES) == sum(len(dataclasses.fields(k)) for k in (TrainConfig, *GROUPS.values())) - len(GROUPS)
), "two groups have an option of the same name"


def _marked(mark: str) -> frozenset[str]:
    return frozenset(name for name, kind in TYPES.items() if mark in getattr(kind, "__metadata__", ()))


FREE_TO_CHANGE = _marked(MAY_CHANGE)
"""Options that may differ when a run goes on. A cache may have moved: what it holds is compared instead."""

ADJUSTABLES = _marked(ADJUSTABLE)
"""Options that may differ, which is said and recorded: how the run learns from there on."""

DEFAULTS: dict[str, Any] = {
    option.name: _jsonable(option.default)
    for owner in (TrainConfig, *GROUPS.values())
    for option in dataclasses.fields(owner)
    if option.default is not dataclasses.MISSING and option.name not in NOT_SAVED
}
"""Of options that have one: what a run was trained with that was started before there was the option."""


def _sort_by_group(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    own: dict[str, Any] = {}
    by_group: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in OPTIONS:
            raise InputError(f"unknown option {name!r}: choose from {', '.join(sorted(OPTIONS))}")
        group = OPTIONS[name]
        (own if group is None else by_group.setdefault(group, {}))[name] = _from_json(name, value)
    return own, by_group
