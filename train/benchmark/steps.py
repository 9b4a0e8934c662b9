"""The trainer's own step, timed: DeepSpeed's engine, float32 masters, clipping, moving average; batches from memory.

All variants of a setting run on one engine, so that what differs is the variant.
"""

import dataclasses
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import InputError
from train.benchmark.parts import PartTimes
from train.benchmark.step_fitting import fitted_recomputation
from train.benchmark.step_settings import SPATIAL_STRIDE, Setting
from train.benchmark.variants import Variant
from train.config import TrainConfig
from train.data import Batch
from train.diffusion.objective import create_objective
from train.ema import Ema
from train.model import build_model, model_config
from train.model.checkpointing import Recomputation
from train.model.config import ModelConfig
from train.model.flops import training_flop
from train.parallel.ranks import Ranks
from train.parallel.verdict import Verdict
from train.parallel.zero import build_engine
from train.pass_graphs import CudaRecorder
from train.peak import synchronize
from train.planning.fitting import device_memory
from train.step import TrainingStep

CAPTION_TOKENS = 120
"""Valid tokens of every caption; STDiT3 sees them padded to as many as it takes."""
_NUM_CLASSES = 1000
_BATCHES = 4
_FEW_LATENTS = 4
"""Rows and columns of latents with which a device has hardly any work: a few tokens a frame."""
_PART_STEPS = 2
_ENOUGH_ABOVE = {2: 3, 10: 2}
"""Steps that are enough, by the seconds that one takes more than."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How long to measure."""

    warmup: int = 3
    """Steps before the clock starts; one where only some of the blocks run, for those steps are long."""
    steps: int = 8
    """Steps that are timed; their median counts. At most 3 where one takes more than 2 seconds, 2 of more than 10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """What one variant of a setting came to; what is counted is of one device, also where several ran."""

    setting: str
    variant: str
    batch: int
    """Samples of a rank, or of the ranks that share their samples."""
    num_ranks: int = 1
    attention: str = ""
    """The kernel of attention in space or among all tokens."""
    recomputed: str = ""
    """What of the blocks that ran, as ``--activation-checkpointing`` says it."""
    step_ms: float = math.nan
    samples_per_second: float = math.nan
    tokens_per_second: float = math.nan
    tflops: float = math.nan
    mfu: float = math.nan
    peak_memory_gib: float | None = None
    """Of the rank that took most, with the blocks that ran; None on a CPU."""
    reserved_memory_gib: float | None = None
    """What PyTorch's allocator took from the device for that, at most."""
    other_memory_gib: float | None = None
    """What the device has in use besides: the CUDA context, kernels, NCCL's buffers."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    """From steps of their own, with events around each part; of graphs there are none."""
    scaled_from_blocks: int | None = None
    """Set where fewer blocks ran, and time was scaled to all."""
    launching_ms: float | None = None
    """A step of as many samples with a few tokens a frame, on which a GPU hardly works: what launching a step takes.
    Where it is near ``step_ms``, the thread that launches is the limit. None for plain forms, on a CPU, and online."""
    encoders_alone_ms: float | None = None
    """What encodes the batch, without a step after it."""
    sum_of_parts_ms: float | None = None
    """That, and the step of the row from a cache."""
    times_one_rank: float | None = None
    """All ranks' tokens a second over those of one rank in a run of its own, just before."""
    published: float | None = None
    """Tokens (of images: images) a second, on one H800."""
    times_published: float | None = None
    error: str = ""
    """Why it did not run, such as too little memory."""


class Bench:
    """One setting on one engine.

    Args:
        setting: What is trained.
        ranks: Of the benchmark.
        overrides: Settings of the model, so that tests can take a tiny one.
        blocks: Of the model, if not all of them.
        device_memory_gib: For ``auto``; None: what the device has besides what lies there now.
    """

    def __init__(
        self,
        setting: Setting,
        ranks: Ranks,
        overrides: dict[str, Any],
        blocks: int | None,
        device_memory_gib: float | None = None,
    ) -> None:
        self.setting, self._ranks = setting, ranks
        self._device_bytes = device_memory(device_memory_gib, ranks.device)
        ranks.share_samples(setting.sequence_parallel, zero_stage=2)
        if setting.labels:
            overrides = {"num_classes": _NUM_CLASSES, **overrides}
        self.whole = model_config(setting.model, **overrides)
        self.config = self.whole if blocks is None else dataclasses.replace(self.whole, depth=blocks)
        run = TrainConfig.of(
            cache="memory",
            output=Path("unused"),
            model=setting.model,
            batch_size=setting.batch * ranks.num_data_ranks,
            sequence_parallel=setting.sequence_parallel,
        )
        torch.manual_seed(run.seed)
        with ranks.device:  # initial weights of this size take a CPU most of a minute
            self.model = build_model(self.config)
        if setting.sequence_parallel > 1:
            self.model.layout_for = ranks.sequence.layout_for
        self.recomputation = Recomputation(mode="none")
        self._engine, masters = build_engine(self.model, run, ranks.device, ranks.world_size)
        self._objective = create_objective(None, model=setting.model, spatial_stride=SPATIAL_STRIDE)
        self._step = self._steps_of(graphs=False)
        assert run.optimiser.ema_decay is not None
        self._ema = Ema(masters, run.optimiser.ema_decay)
        self._lr = run.optimiser.lr
        first = _BATCHES * ranks.data_rank
        self._batches = [self._random_batch(seed, setting.latent_size) for seed in range(first, first + _BATCHES)]
        self._taken = 0
        self._before: Verdict | None = None
        self._part_steps = _PART_STEPS
        self.prepare: Callable[[Batch], Batch] | None = None
        """What is done to a batch on the device before the step, such as encoding it."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        frames, rows, columns = self.whole.grid(self.setting.latent_size)
        return frames * rows * columns

    def set_up(self, variant: Variant) -> None:
        """Has steps launched as a variant says, and the blocks compute again what the setting says: for ``auto``, the
        least with which the variant fits.

        What fits is of the whole model. Where only some of its blocks run, all do what its first ones do, which compute
        most again: scaled to the whole, they are never better than it.

        Raises:
            InputError: for ``auto`` where the device's memory is not known.
        """
        mode = self.setting.checkpointing
        self.recomputation = Recomputation(mode=mode) if mode != "auto" else self._fitted(variant)
        if self.config != self.whole:
            self.recomputation = Recomputation(mode=self.recomputation.mode)
        self.model.checkpoint_blocks(self.recomputation)
        self._step.give_memory_back()
        self._step = self._steps_of(graphs=variant.graphs)

    def _steps_of(self, *, graphs: bool) -> TrainingStep:
        return TrainingStep(self._engine, self.model, self._objective, recorder=CudaRecorder() if graphs else None)

    def _fitted(self, variant: Variant) -> Recomputation:
        setting = self.setting
        if self._device_bytes is None or setting.labels:
            raise InputError(f"{setting.name}, checkpointing auto: give --device-memory-gib, and captions")
        return fitted_recomputation(
            self.whole,
            dataclasses.replace(variant, name=""),
            model=setting.model,
            batch=setting.batch,
            latent_size=setting.latent_size,
            sequence_parallel=setting.sequence_parallel,
            world_size=self._ranks.world_size,
            device_bytes=-self._ranks.maximum(-self._device_bytes),
        )

    def flop(self) -> float:
        """Returns the model's operations of a step, all blocks and all ranks of a sample, recomputation not counted."""
        frames, rows, columns = self.whole.grid(self.setting.latent_size)
        of_one = training_flop(
            self.whole,
            num_frames=frames,
            frame_tokens=rows * columns,
            caption_tokens=0 if self.setting.labels else min(CAPTION_TOKENS, self.whole.model_max_length),
        )
        return of_one * self.setting.batch

    def _random_batch(self, seed: int, latent_size: tuple[int, int, int]) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        B, config, on_gpu = self.setting.batch, self.whole, self._ranks.device.type == "cuda"
        latents = torch.randn(B, config.in_channels, *latent_size, generator=generator).bfloat16()
        captions, mask = self._random_captions(config, generator)
        size = torch.full((B,), float(self.setting.size))
        batch = Batch(
            latents=latents,
            u=torch.rand(B, generator=generator, dtype=torch.float64),
            noise_keys=torch.arange(B) + seed * B,
            captions=captions,
            mask=mask,  # type: ignore[arg-type]  # labels have none
            drop_caption=torch.rand(B, generator=generator) < 0.1,
            fps=torch.full((B,), 24.0),
            height=size,
            width=size,
            identity=torch.zeros(B, 2, dtype=torch.int64),
        )
        if not on_gpu:
            return batch
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        return dataclasses.replace(batch, **pinned)

    def _random_captions(self, config: ModelConfig, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        B = self.setting.batch
        if self.setting.labels:
            return torch.randint(_NUM_CLASSES, (B,), generator=generator), None
        length = config.model_max_length
        captions = torch.randn(B, 1, length, config.caption_channels, generator=generator).bfloat16()
        mask = (torch.arange(length) < CAPTION_TOKENS).to(torch.int64).expand(B, -1).clone()
        return captions * mask[:, None, :, None], mask

    def step(self, parts: PartTimes | None = None) -> None:
        """Takes one step."""
        parts = parts or PartTimes(torch.device("cpu"))
        with parts.span("data wait"):
            batch = self._batches[self._taken % _BATCHES].to(self._ranks.device)
        if self.prepare is not None:
            with parts.span("encoders"):
                batch = self.prepare(batch)
        result = self._step.take(batch, self._lr, self._ema.following(self._taken))
        if self._before is not None:  # as the trainer does
            self._before.wait()
        self._before = result.verdict
        self._taken += 1

    def parts(self) -> dict[str, float]:
        """Returns milliseconds of a step by part, measured in steps of their own."""
        parts = PartTimes(self._ranks.device)
        take_step = self._engine.step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            with parts.span("optimiser"):
                return take_step(*args, **kwargs)

        self._engine.step = timed_step
        try:
            with parts.of_modules(self.model), parts.span("all"):
                for _ in range(self._part_steps):
                    self.step(parts)
            found = {name: ms / self._part_steps for name, ms in parts.milliseconds().items()}
        finally:
            del self._engine.step
        found["rest"] = 2 * found["all"] - sum(found.values())
        return found

    def seconds(self, timing: Timing) -> float:
        """Returns the median seconds of a step after the warm-up, from the end of the one before to its own.

        As in the trainer, none but the first is waited for: on a GPU ends are events. Of several ranks, the slowest
        counts.
        """
        for _ in range(timing.warmup if self.setting.blocks is None else min(timing.warmup, 1)):
            self.step()
        return self._median_seconds(self.step, timing.steps)

    def launching_seconds(self, timing: Timing) -> float:
        """Returns the median seconds of a step of as many samples with a few tokens a frame."""
        batches = self._batches
        few = self._random_batch(0, (self.setting.frames, _FEW_LATENTS, _FEW_LATENTS))
        self._batches = [few] * _BATCHES
        try:
            for _ in range(timing.warmup):  # kernels are compiled for these sizes
                self.step()
            return self._median_seconds(self.step, timing.steps)
        finally:
            self._batches = batches

    def encoders_seconds(self, timing: Timing) -> float:
        """Returns the median seconds of :attr:`prepare` alone."""
        assert self.prepare is not None
        batch, prepare = self._batches[0].to(self._ranks.device), self.prepare
        return self._median_seconds(lambda: prepare(batch), timing.steps)

    def _median_seconds(self, work: Callable[[], Any], times: int) -> float:
        synchronize(self._ranks.device)
        clock = PartTimes(self._ranks.device)
        ends = [clock.mark()]
        self._part_steps = _PART_STEPS
        while len(ends) <= times:
            work()
            ends.append(clock.mark())
            if len(ends) == 2:
                synchronize(self._ranks.device)
                first = self._ranks.maximum(clock.elapsed_ms(*ends) / 1000)
                for seconds, enough in _ENOUGH_ABOVE.items():
                    if first > seconds:
                        times, self._part_steps = min(times, enough), 1
        synchronize(self._ranks.device)
        median = statistics.median(clock.elapsed_ms(start, end) for start, end in pairwise(ends)) / 1000
        return self._ranks.maximum(median)

    def close(self) -> None:
        """Frees the engine's memory."""
        self._step.give_memory_back()
        self._engine.destroy()
        self.model = nn.Module()  # type: ignore[assignment]
        del self._engine, self._step, self._ema, self._batches
        free_memory()


def free_memory() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
