"""The memory of one device: what stays there between steps, and what a step adds. Pure.

What DeepSpeed holds follows its ZeRO optimisers (``deepspeed/runtime/zero/stage_1_and_2.py``, ``stage3.py``): float32
masters and AdamW's two moments are shared by all ranks from stage 1 on, gradients from stage 2 on, weights in stage 3;
gradients are gathered into a bucket of fixed size; the optimiser's step makes float32 copies of a rank's gradients.
Where gradients and steps are :mod:`train.parallel.lean_zero`'s, buckets are its own, and there are no such copies.
"""

from dataclasses import dataclass

from train.config import OptimiserOptions, ParallelOptions
from train.parallel.buckets import STAGING_BUFFERS, largest_bucket, uses_buckets

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's ``reduce_bucket_size``: gradients that are averaged together."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's ``stage3_max_live_parameters``: weights that stage 3 keeps together."""
WORKSPACE_BYTES = 64 * 2**20
"""What libraries keep for themselves inside PyTorch's allocator: the workspaces of cuBLAS."""
OUTSIDE_BYTES = 1400 * 2**20
"""What lies outside of PyTorch's allocator: the CUDA context and kernels (1.3 GiB found on H100 and H200)."""
NCCL_BYTES = 1200 * 2**20
"""What lies there besides with several ranks (1.2 GiB found with two)."""
FRAGMENTATION = 0.01
"""Share of what PyTorch allocated that its allocator holds besides, with segments that grow (0.2 to 0.8 % found)."""
FIXED_FRAGMENTATION = 0.04
"""The same with segments of fixed size, where what one bucket leaves cannot all be used by the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes of one device, by what they are for."""

    weights: int
    masters: int
    """Float32."""
    moments: int
    """AdamW's, float32."""
    average: int
    """EMA, float32."""
    reduce_bucket: int
    """Gradients on their way to other ranks; while gradients are computed."""
    working: int
    """Activations, temporaries and gradients of a forward and a backward pass, at most."""
    update: int
    """Gradients and their copies while the optimiser takes its step."""
    places: int = 0
    """Of the batch that graphs read and the gradients that they write, which stay."""
    outside: int = OUTSIDE_BYTES
    """Outside of PyTorch's allocator."""
    fragmentation: float = FRAGMENTATION
    """Share of the peak that PyTorch's allocator holds besides."""

    @property
    def resident(self) -> int:
        """What stays between steps."""
        return self.weights + self.masters + self.moments + self.average + self.places

    @property
    def peak(self) -> int:
        """What PyTorch allocates at most (``torch.cuda.max_memory_allocated``)."""
        return self.resident + WORKSPACE_BYTES + max(self.reduce_bucket + self.working, self.update)

    @property
    def needed(self) -> int:
        """What the device must have."""
        return int(self.peak * (1 + self.fragmentation)) + self.outside


def plan_memory(
    parallel: ParallelOptions,
    optimiser: OptimiserOptions,
    *,
    num_weights: int,
    num_trained: int,
    world_size: int,
    working: int,
    inputs: int = 0,
) -> MemoryPlan:
    """Returns the memory of one device.

    Args:
        parallel: Stage and precision.
        optimiser: Whether there is an average.
        num_weights: All of the model's parameters and buffers.
        num_trained: Those that are trained.
        world_size: Ranks.
        working: See :func:`train.planning.activations.working_bytes`.
        inputs: What a pass reads of a batch.
    """
    stage, width = parallel.zero_stage, 2 if parallel.precision == "bfloat16" else 4
    shards = world_size if stage >= 1 else 1
    own = -(-num_trained // shards)
    average = 4 * own if optimiser.ema_decay is not None else 0
    outside = OUTSIDE_BYTES + NCCL_BYTES * (world_size > 1)
    if stage == 0:  # in float32 the weights are their own masters
        masters = 4 * own if width == 2 else 0
        return MemoryPlan(
            weights=width * num_weights,
            masters=masters,
            moments=8 * own,
            average=average,
            reduce_bucket=0,
            working=working,
            update=width * own + masters,
            outside=outside,
        )
    on_device = parallel.offload == "none"
    weights = width * num_weights
    if stage == 3:
        part = 0 if parallel.offload == "all" else -(-num_weights // world_size)
        weights = width * (part + min(num_weights, LIVE_ELEMENTS))
    if uses_buckets(parallel, optimiser):
        bucket = width * largest_bucket(num_trained, own)
        sent_meanwhile = stage == 2 and world_size > 1
        staged = STAGING_BUFFERS * bucket if world_size > 1 else 0
        return MemoryPlan(
            weights=weights,
            masters=4 * own,
            moments=8 * own,
            average=average,
            reduce_bucket=staged + bucket if sent_meanwhile else 0,  # one is being waited for
            working=working,
            # gathered before, or now, one bucket after the other, each freeing what it is made of
            update=width * own if sent_meanwhile else width * num_trained + staged + bucket,
            places=width * own + inputs if parallel.cuda_graphs else 0,
            outside=outside,
        )
    gradients = (4 if optimiser.gradient_accumulation > 1 else width) * own
    return MemoryPlan(
        weights=weights,
        masters=4 * own if on_device else 0,
        moments=8 * own if on_device else 0,
        average=average if on_device else 0,
        reduce_bucket=width * (REDUCE_BUCKET_ELEMENTS if stage < 3 else min(num_trained, REDUCE_BUCKET_ELEMENTS)),
        working=working,
        update=2 * gradients + 4 * own if on_device else 0,
        outside=outside,
    )


def gradient_shards(parallel: ParallelOptions, world_size: int) -> int:
    """Returns by how many ranks the gradients are shared."""
    return world_size if parallel.zero_stage >= 2 else 1
