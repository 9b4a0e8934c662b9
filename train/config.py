"""What a training run is told, and how it is kept beside the run."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shared.errors import InputError
from train.model.attention import AttentionBackend
from train.rank_batches import OnCorrupt
from train.sample_index import Variants
from train.where import Where, parse_fraction

_BATCH_SIZE = 8
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Trains a video diffusion transformer from a cache. Run again with the same output, it goes on from there."""

    cache: str
    """The cache that preprocess made: a folder, or s3://bucket/prefix, gs://, az://."""
    output: Path
    """The run's folder: configuration, metrics, checkpoints."""
    model: str = "stdit-xl/2"
    """A preset: stdit-xl/2, stdit-s/2 or stdit-ti/2."""
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Settings of the model that differ from the preset, e.g. ``depth=4 hidden_size=128``. Values are JSON."""
    buckets: tuple[str, ...] = ()
    """Train on these buckets only (FRAMESxHEIGHTxWIDTH); all of the cache's by default."""
    where: str | None = None
    """Train on what fulfils a condition on columns of manifest or index, e.g. 'aesthetic > 5 and fps >= 24'."""
    holdout: str | None = None
    """Keep a part of the sources, e.g. 1%, out of training; all samples of a source are on one side."""
    variants: Variants = "one"
    """Of a clip that was encoded in several windows, or mirrored: each epoch one of them, or all."""
    batch_size: int = _BATCH_SIZE
    """Samples of one step, over all ranks."""
    batch_tokens: int | None = None
    """Most tokens of one step, over all ranks, in place of --batch-size: each bucket gets as many samples as fit."""
    batch_multiple: int = 1
    """With --batch-tokens: samples of a step are a multiple of this; the number of ranks must divide it."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    lr: float = 2e-5
    """Learning rate of AdamW after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float | None = 0.9999
    """Decay of the weights' moving average; None keeps no average. Early steps use less, see train/ema.py."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards: 0 nothing (float32 only), 1 the optimiser's state, 2 gradients too, 3 weights too."""
    precision: Precision = "bfloat16"
    """Of weights, activations and gradients; the master weights are float32."""
    caption_dropout: float = 0.1
    """How often the null caption is trained, for guidance."""
    seed: int = 0
    """Decides the initial weights, the order of the samples and all noise."""
    num_workers: int = 2
    """Processes a rank that read ahead; 0 reads in the trainer."""
    on_corrupt: OnCorrupt = "stop"
    """At a sample that is missing or damaged: stop, or train on the next good one instead and count it."""
    local_cache: Path | None = None
    """A folder on a disk of each node: for the index, and for what was read from an object store."""
    local_cache_gb: float = 100.0
    """Most that --local-cache keeps of an object store, in 10^9 bytes."""
    attention_backend: AttentionBackend | None = None
    """The attention kernel; None chooses by device and shape."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them."""
    log_every: int = 10
    """Steps from one line of the log to the next."""
    checkpoint_every: int = 1000
    """Steps from one checkpoint to the next; the last step always has one."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    peak_tflops: float | None = None
    """Dense bfloat16 peak of one device, the base of MFU; known for common GPUs, measured elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard's event files, to OUTPUT/tensorboard."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_multiple", "steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("seed", "warmup_steps", "num_workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 0")
        for name in ("lr", "gradient_clip", "peak_tflops", "batch_tokens", "local_cache_gb"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.batch_tokens is not None and self.batch_size != _BATCH_SIZE:
            raise InputError(f"batch_size={self.batch_size} and batch_tokens={self.batch_tokens}: give one of them")
        if self.batch_tokens is None and self.batch_multiple != 1:
            raise InputError(f"batch_multiple={self.batch_multiple} does nothing without --batch-tokens")
        if self.where is not None:
            Where(self.where)
        if self.holdout is not None:
            parse_fraction(self.holdout)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay}: expected 0 < decay < 1, or None")
        if self.zero_stage == 0 and self.precision == "bfloat16":
            raise InputError("zero_stage=0 keeps no float32 master weights in bfloat16: use stage 1, or float32")
        if self.ema_decay is not None and self.zero_stage == 3:
            raise InputError("zero_stage=3 shards the weights that ema_decay averages: use --ema-decay None or stage 2")

    @property
    def model_overrides(self) -> dict[str, Any]:
        """The model's settings, parsed.

        Raises:
            InputError: if one is not NAME=VALUE with a JSON value.
        """
        overrides = {}
        for setting in self.model_settings:
            name, separator, value = setting.partition("=")
            try:
                overrides[name] = json.loads(value)
            except json.JSONDecodeError:
                separator = ""
            if not separator:
                raise InputError(f"--set {setting}: expected NAME=VALUE with a JSON value, e.g. depth=4")
        return overrides

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as JSON values."""
        values = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }


DEFAULTS = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in dataclasses.fields(TrainConfig)
    if field.default is not dataclasses.MISSING
}
"""Of settings that have one: what a run was trained with that was started before there was the setting."""

FREE_TO_CHANGE = frozenset(
    {
        "cache",
        "output",
        "steps",
        "num_workers",
        "on_corrupt",
        "local_cache",
        "local_cache_gb",
        "attention_backend",
        "activation_checkpointing",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "peak_tflops",
        "tensorboard",
        "debug",
    }
)
"""Settings that may differ when a run goes on. A cache may have moved: what it holds is compared instead."""
