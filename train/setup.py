"""Everything about a run that can be checked before it trains."""

from dataclasses import dataclass

import torch

from shared.errors import InputError
from shared.wording import counted
from train.boards import require_boards
from train.config import TrainConfig
from train.diffusion.objective import Objective, create_objective
from train.diffusion.samplers import create_sampler
from train.held_out import FixedSamples
from train.lora import require_peft
from train.model import model_config
from train.model.attention import require_backend
from train.model.config import DiTConfig, ModelConfig
from train.model.float8 import require_float8_units, require_float8_widths
from train.open_index import open_index
from train.parallel.ranks import Ranks
from train.parallel.sequence import require_heads, require_size
from train.plan import BatchPlan, batch_sizes_by_tokens, rank_slots, select_buckets
from train.run_folder import RunDescription, jsonable, open_run, require_same_run
from train.sample_index import IndexedSamples

_SET_ELSEWHERE = {
    "in_channels": "the cache decides it",
    "caption_channels": "the cache decides it",
    "model_max_length": "the cache decides it",
    "input_size": "the cache's buckets decide it",
    "class_dropout_prob": "use --caption-dropout",
    "num_classes": "a cache has captions, not labels",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRun:
    """A run whose settings fit each other, the cache and the ranks."""

    config: TrainConfig
    index: IndexedSamples
    plan: BatchPlan
    model_config: ModelConfig
    dtype: torch.dtype
    objective: Objective


def check_run(config: TrainConfig, ranks: Ranks) -> CheckedRun:
    """Returns the run after every check that needs no model; the first rank compares it with what its folder holds.

    Raises:
        InputError: for whatever does not fit.
    """
    if config.parallel.products == "float8":
        require_float8_units(ranks.device)
    if config.parallel.cuda_graphs and ranks.device.type != "cuda":
        raise InputError(f"cuda_graphs needs a GPU, found {ranks.device.type}: leave it out")
    run = plan_run(
        config,
        data_rank=ranks.data_rank,
        num_data_ranks=ranks.num_data_ranks,
        device_type=ranks.device.type,
        encoders_on=ranks.device,
    )
    if ranks.is_first:
        require_same_run(config.output, _describe(run))
    return run


def begin_run(run: CheckedRun) -> list[str]:
    """Makes the folder of a new run, or records what is adjusted of the run there, when nothing is left that could be
    wrong.

    Returns:
        What is adjusted, each with both values.
    Raises:
        InputError: if something else is there.
    """
    return open_run(run.config.output, _describe(run))


def plan_run(
    config: TrainConfig,
    *,
    data_rank: int,
    num_data_ranks: int,
    device_type: str,
    encoders_on: torch.device | None = None,
) -> CheckedRun:
    """Returns the run of one rank after every check; nothing is written but the node's index.

    Args:
        config: What is asked for.
        data_rank: Which part of each batch it has.
        num_data_ranks: Into how many parts batches are divided.
        device_type: Of the devices that are to train.
        encoders_on: This rank's device, if clips are encoded online; without it that cannot be planned.

    Raises:
        InputError: for whatever does not fit.
    """
    dtype = torch.bfloat16 if config.parallel.precision == "bfloat16" else torch.float32
    if config.parallel.attention_backend is not None:
        require_backend(config.parallel.attention_backend, device_type, dtype)
    if config.parallel.offload != "none" and device_type == "cpu":
        raise InputError(f"offload={config.parallel.offload} does nothing without a GPU: leave it out")
    require_boards(config.log)
    if config.finetuning.lora_rank is not None:
        require_peft()
    if config.data.batch_tokens is None:
        rank_slots(config.data.batch_size, data_rank, num_data_ranks)
    else:
        rank_slots(config.data.batch_multiple, data_rank, num_data_ranks, name="batch_multiple")
    overrides = config.architecture.overrides
    for name, reason in _SET_ELSEWHERE.items():
        if name in overrides:
            raise InputError(f"--set {name}={overrides[name]}: {reason}")
    wanted = model_config(config.architecture.model, **overrides)  # a mistake in it is told before one in the cache
    if config.parallel.products == "float8":
        require_float8_widths(wanted)
    index = open_index(config, encoders_on)
    buckets = select_buckets(index.buckets, () if config.cache is None else config.data.buckets)
    most_common = max(buckets, key=lambda bucket: buckets[bucket].num_samples)
    architecture = model_config(
        config.architecture.model,
        **overrides,
        in_channels=index.geometry.latent_channels,
        caption_channels=index.caption_channels,
        model_max_length=index.max_tokens,
        input_size=index.latent_size(most_common),
        class_dropout_prob=config.diffusion.caption_dropout,
    )
    diffusion = config.diffusion
    if diffusion.mask_ratios and architecture.patch_size[0] != 1:
        raise InputError(
            f"mask_ratios={' '.join(diffusion.mask_ratios)}: patches of {architecture.patch_size[0]} frames cannot be "
            "given in part: use a patch_size of one frame, or leave it out"
        )
    objective = create_objective(
        diffusion.objective,
        model=config.architecture.model,
        spatial_stride=index.geometry.spatial_stride,
        min_snr_gamma=diffusion.min_snr_gamma,
        flow_times=diffusion.flow_times,
        flow_shift=diffusion.flow_shift,
    )
    if objective.learns_variance and not architecture.pred_sigma:
        raise InputError("--set pred_sigma=false: the loss teaches the variance too: leave it out")
    judged = config.evaluation
    if judged.preview_every is not None:
        create_sampler(None, judged.preview_sampling_steps, objective)
    shows_captions = judged.preview_every is not None and judged.preview_prompts is None
    if config.data.holdout is not None and (judged.evaluate_every is not None or shows_captions):
        FixedSamples.open(config, 1, held_out=True)
    if isinstance(architecture, DiTConfig):
        require_heads(architecture.num_heads, config.parallel.sequence_parallel)
    tokens = {}
    for bucket in buckets:
        try:
            frames, rows, columns = architecture.grid(index.latent_size(bucket))
            require_size(frames, rows * columns, config.parallel.sequence_parallel)
            tokens[bucket] = frames * rows * columns
        except InputError as error:
            raise InputError(f"bucket {bucket}: {error}, or choose others with --buckets") from None
    sizes = dict.fromkeys(buckets, config.data.batch_size)
    if config.data.batch_tokens is not None:
        sizes = batch_sizes_by_tokens(
            tokens, batch_tokens=config.data.batch_tokens, multiple=config.data.batch_multiple
        )
    for bucket, size in sizes.items():
        parts = config.optimiser.gradient_accumulation
        if size // num_data_ranks % parts:
            raise InputError(
                f"gradient_accumulation={parts} does not divide the {counted(size // num_data_ranks, 'sample')} that a "
                f"rank takes of bucket {bucket}: use a divisor of it, or another batch size"
            )
    plan = BatchPlan(buckets, batch_sizes=sizes, seed=config.seed)
    return CheckedRun(
        config=config, index=index, plan=plan, model_config=architecture, dtype=dtype, objective=objective
    )


def require_same_index(index: IndexedSamples, ranks: Ranks) -> None:
    """Raises :class:`InputError` if ranks see different samples, as while a job adds some. All ranks call it."""
    number = float(int(index.digest[:12], 16))
    if ranks.maximum(number) != -ranks.maximum(-number):
        raise InputError(f"{index.url}: the ranks found different samples there: wait until no job adds to the cache")


def _describe(run: CheckedRun) -> RunDescription:
    index = run.index
    return RunDescription(
        config=run.config.to_json(),
        model_config=jsonable(run.model_config),
        provenance=index.provenance,
        buckets={str(b): {"samples": index.buckets[b].num_samples, "fps": index.fps(b)} for b in run.plan.buckets},
        samples_sha256=index.digest,
    )
