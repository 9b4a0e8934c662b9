"""``python -m train --dry-run``: what a run would do and take, and whether it fits."""

from dataclasses import dataclass

import torch

from shared.errors import InputError
from shared.spec import Bucket
from shared.wording import counted
from train.building import build_model
from train.model.flops import training_flop
from train.planning.activations import meta_model, step_memory
from train.planning.memory import MemoryPlan
from train.setup import CheckedRun

_GIB = 2**30
_SHOWN = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPlan:
    """What steps of one bucket take."""

    bucket: Bucket
    batch_size: int
    """Over all ranks."""
    micro_batch: int
    """Of one rank, at a time."""
    tokens: int
    """Of a step, over all ranks."""
    flop: float
    """Of a step, over all ranks: three times the forward pass, captions at their greatest length."""
    memory: MemoryPlan
    """Of one device."""


def plan_bucket(run: CheckedRun, bucket: Bucket, world_size: int) -> BucketPlan:
    """Returns what steps of a bucket take; the model's passes are counted, so it takes seconds.

    Args:
        run: A checked run of ``world_size`` ranks.
        bucket: One of its buckets.
        world_size: Ranks.
    """
    config, index, architecture = run.config, run.index, run.model_config
    batch_size = run.plan.batch_size(bucket)
    degree = config.parallel.sequence_parallel
    micro_batch = batch_size // (world_size // degree) // config.optimiser.gradient_accumulation
    size = index.latent_size(bucket)
    frames, rows, columns = architecture.grid(size)
    memory = step_memory(
        meta_model(architecture, config),
        run.objective,
        config,
        num_samples=micro_batch,
        latent_shape=(architecture.in_channels, *size),
        captions=(architecture.model_max_length, architecture.caption_channels),
        world_size=world_size,
    )
    flop = training_flop(
        architecture,
        num_frames=frames,
        frame_tokens=rows * columns,
        caption_tokens=architecture.model_max_length,
    )
    return BucketPlan(
        bucket=bucket,
        batch_size=batch_size,
        micro_batch=micro_batch,
        tokens=batch_size * frames * rows * columns,
        flop=batch_size * flop,
        memory=memory,
    )


def largest_buckets(run: CheckedRun, number: int) -> list[Bucket]:
    """Returns the buckets with the most tokens a step, the largest first."""

    def tokens(bucket: Bucket) -> int:
        frames, rows, columns = run.model_config.grid(run.index.latent_size(bucket))
        return run.plan.batch_size(bucket) * frames * rows * columns

    return sorted(run.plan.buckets, key=tokens, reverse=True)[:number]


def require_memory(plan: BucketPlan, device_bytes: float) -> None:
    """Checks that a bucket fits on a device.

    Raises:
        InputError: if it does not.
    """
    needed = plan.memory.needed
    if needed > device_bytes:
        raise InputError(
            f"bucket {plan.bucket}, {counted(plan.micro_batch, 'sample')} at a time: needs about "
            f"{needed / _GIB:.1f} GiB a device, found {device_bytes / _GIB:.1f} GiB: use a smaller --batch-size, "
            "--gradient-accumulation, --activation-checkpointing auto or full, more ranks, or leave the bucket out by "
            "--buckets"
        )


def describe(run: CheckedRun, world_size: int) -> str:
    """Returns what a run would do and take, for people."""
    config = run.config
    with torch.device("meta"):
        model = build_model(run.model_config, config)
    num_parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parallel = config.parallel
    lines = [
        f"model       {config.architecture.model}: {num_parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of "
        f"them trained; {run.objective.name}",
        f"data        {counted(run.plan.num_samples, 'sample')} an epoch in "
        f"{counted(len(run.plan.buckets), 'bucket')} of {run.index.url}",
        f"ranks       {world_size}, ZeRO {parallel.zero_stage}, {parallel.computed_in}, activation checkpointing "
        f"{parallel.recomputation}, {counted(config.optimiser.gradient_accumulation, 'part')} a step"
        f"{', CUDA graphs' * parallel.cuda_graphs}",
        f"steps       {config.steps:,}, lr {config.optimiser.lr:g} {config.optimiser.lr_schedule} after "
        f"{counted(config.optimiser.warmup_steps, 'step')} of warm-up",
    ]
    plans = [plan_bucket(run, bucket, world_size) for bucket in largest_buckets(run, _SHOWN)]
    held = plans[0].memory
    lines += [
        f"memory      GiB a device: weights {held.weights / _GIB:.2f}, masters {held.masters / _GIB:.2f}, moments "
        f"{held.moments / _GIB:.2f}, average {held.average / _GIB:.2f}"
        f"{f', places of graphs {held.places / _GIB:.2f}' * parallel.cuda_graphs}; and what steps add:",
        "",
        f"{'bucket':<16}{'samples':>9}{'at a time':>11}{'tokens':>13}{'TFLOP':>9}"
        f"{'working':>10}{'peak':>9}{'needed':>9}",
    ]
    lines += [
        f"{plan.bucket!s:<16}{plan.batch_size:>9}{plan.micro_batch:>11}{plan.tokens:>13,}{plan.flop / 1e12:>9.1f}"
        f"{(plan.memory.working + plan.memory.reduce_bucket) / _GIB:>10.2f}{plan.memory.peak / _GIB:>9.2f}"
        f"{plan.memory.needed / _GIB:>9.2f}"
        for plan in plans
    ]
    left = len(run.plan.buckets) - _SHOWN
    if left > 0:
        lines.append(f"and {counted(left, 'smaller bucket')}")
    if parallel.device_memory_gib is not None:
        require_memory(plans[0], parallel.device_memory_gib * _GIB)
        lines.append(f"fits on devices of {parallel.device_memory_gib:g} GiB")
    return "\n".join(lines)
