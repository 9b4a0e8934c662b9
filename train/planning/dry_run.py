"""``python -m train --dry-run``: what a run would do and take, and whether it fits."""

from dataclasses import dataclass

import torch

from shared.errors import InputError
from shared.spec import Bucket
from train.building import build_model
from train.model.flops import stdit_training_flop
from train.planning.activations import meta_batch, meta_model, working_bytes
from train.planning.memory import MemoryPlan, gradient_shards, plan_memory
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
    model = meta_model(architecture, config.parallel)
    batch = meta_batch(
        micro_batch,
        (architecture.in_channels, *size),
        (architecture.model_max_length, architecture.caption_channels),
        torch.bfloat16,
    )
    parameters = list(model.parameters())
    memory = plan_memory(
        config.parallel,
        config.optimiser,
        num_weights=sum(t.numel() for t in (*parameters, *model.buffers())),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        world_size=world_size,
        # Ranks that share a sample hold a part of its tokens each.
        working=working_bytes(model, run.objective, batch, gradient_shards=gradient_shards(config.parallel, world_size))
        // degree,
    )
    flop = stdit_training_flop(
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
            f"bucket {plan.bucket}, {plan.micro_batch} samples at a time: needs about {needed / _GIB:.1f} GiB a "
            f"device, found {device_bytes / _GIB:.1f} GiB: use a smaller --batch-size, --gradient-accumulation, "
            "--activation-checkpointing full, more ranks, or leave the bucket out with --buckets"
        )


def describe(run: CheckedRun, world_size: int) -> str:
    """Returns what a run would do and take, for people."""
    config = run.config
    with torch.device("meta"):
        model = build_model(run.model_config, config.parallel)
    num_parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parallel = config.parallel
    lines = [
        f"model       {config.architecture.model}: {num_parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of "
        f"them trained; {run.objective.name}",
        f"data        {run.plan.num_samples:,} samples an epoch in {len(run.plan.buckets)} buckets of {run.index.url}",
        f"ranks       {world_size}, ZeRO {parallel.zero_stage}, {parallel.precision}, activation checkpointing "
        f"{parallel.activation_checkpointing}, {config.optimiser.gradient_accumulation} parts a step",
        f"steps       {config.steps:,}, lr {config.optimiser.lr:g} {config.optimiser.lr_schedule} after "
        f"{config.optimiser.warmup_steps} steps of warm-up",
        "",
        "                      samples   at a                  TFLOP      GiB a device: stays + step = peak, needed",
        "bucket                 a step   time   tokens a step  a step      weights  masters  moments  average  "
        "activations",
    ]
    for bucket in largest_buckets(run, _SHOWN):
        plan = plan_bucket(run, bucket, world_size)
        memory = plan.memory
        lines.append(
            f"{bucket!s:<20} {plan.batch_size:>8} {plan.micro_batch:>6} {plan.tokens:>15,} {plan.flop / 1e12:>7.0f} "
            f"     {memory.weights / _GIB:>7.2f}  {memory.masters / _GIB:>7.2f}  {memory.moments / _GIB:>7.2f}  "
            f"{memory.average / _GIB:>7.2f}  {(memory.working + memory.reduce_bucket) / _GIB:>11.2f}"
        )
        lines.append(
            f"{'':<20} peak {memory.peak / _GIB:.2f} GiB a device; with what lies outside of the allocator "
            f"{memory.needed / _GIB:.2f} GiB"
        )
        if parallel.device_memory_gib is not None:
            require_memory(plan, parallel.device_memory_gib * _GIB)
    left = len(run.plan.buckets) - _SHOWN
    if left > 0:
        lines.append(f"and {left} smaller buckets")
    return "\n".join(lines)
