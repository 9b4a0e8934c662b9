"""Everything about a run that can be checked before it trains."""

from dataclasses import dataclass

import torch

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.spec import Bucket
from train.config import TrainConfig
from train.data import SampleIndex
from train.metrics import require_tensorboard
from train.model import model_config
from train.model.attention import require_backend
from train.model.config import STDiTConfig
from train.parallel.ranks import Ranks
from train.plan import BatchPlan, rank_slice, select_buckets
from train.run_folder import RunDescription, jsonable, open_run

_SET_ELSEWHERE = {
    "in_channels": "the cache decides it",
    "caption_channels": "the cache decides it",
    "model_max_length": "the cache decides it",
    "input_size": "the cache's buckets decide it",
    "class_dropout_prob": "use --caption-dropout",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRun:
    """A run whose settings fit each other, the cache and the ranks."""

    config: TrainConfig
    index: SampleIndex
    plan: BatchPlan
    part: slice
    """This rank's part of a global batch."""
    model_config: STDiTConfig
    dtype: torch.dtype


def check_run(config: TrainConfig, ranks: Ranks) -> CheckedRun:
    """Returns the run after every check that needs no training.

    Raises:
        InputError: for whatever does not fit.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    if config.attention_backend is not None:
        require_backend(config.attention_backend, ranks.device.type, dtype)
    if config.tensorboard:
        require_tensorboard()
    part = rank_slice(config.batch_size, ranks.rank, ranks.world_size)
    overrides = config.model_overrides
    for name, reason in _SET_ELSEWHERE.items():
        if name in overrides:
            raise InputError(f"--set {name}={overrides[name]}: {reason}")
    model_config(config.model, **overrides)  # a mistake in it is told before one in the cache
    index = SampleIndex(Cache.open(config.cache))
    rows_by_bucket = select_buckets(index.rows_by_bucket, config.buckets)
    most_common = max(rows_by_bucket, key=lambda bucket: len(rows_by_bucket[bucket]))
    architecture = model_config(
        config.model,
        **overrides,
        in_channels=index.geometry.latent_channels,
        caption_channels=index.caption_channels,
        model_max_length=index.max_tokens,
        input_size=index.latent_size(most_common),
        class_dropout_prob=config.caption_dropout,
    )
    if not architecture.pred_sigma:
        raise InputError("--set pred_sigma=false: the loss teaches the variance too: leave it out")
    for bucket in rows_by_bucket:
        try:
            architecture.grid(index.latent_size(bucket))
        except InputError as error:
            raise InputError(f"bucket {bucket}: {error}, or choose others with --buckets") from None
    plan = BatchPlan(rows_by_bucket, batch_size=config.batch_size, seed=config.seed)
    if ranks.is_first:
        open_run(config.output, _describe(config, index, architecture, list(rows_by_bucket)))
    return CheckedRun(config=config, index=index, plan=plan, part=part, model_config=architecture, dtype=dtype)


def _describe(
    config: TrainConfig, index: SampleIndex, architecture: STDiTConfig, buckets: list[Bucket]
) -> RunDescription:
    return RunDescription(
        config=config.to_json(),
        model_config=jsonable(architecture),
        provenance=index.cache.provenance,
        buckets={str(b): {"samples": len(index.rows_by_bucket[b]), "fps": index.fps(b)} for b in buckets},
        samples_sha256=index.digest(),
    )
