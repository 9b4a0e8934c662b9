"""The memory that a step takes: the real model, loss and backward pass on tensors without content."""

import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from train.building import build_model
from train.config import TrainConfig
from train.data import Batch
from train.diffusion.objective import Objective
from train.loss import batch_loss
from train.model.config import ModelConfig
from train.model.transformer import DiffusionTransformer
from train.parallel.allocator import segments_grow
from train.parallel.sequence import busiest_layout
from train.planning.allocations import Allocations
from train.planning.memory import FIXED_FRAGMENTATION, MemoryPlan, gradient_shards, plan_memory


def step_memory(
    model: nn.Module,
    objective: Objective,
    options: TrainConfig,
    *,
    num_samples: int,
    latent_shape: tuple[int, int, int, int],
    captions: tuple[int, int],
    world_size: int,
) -> MemoryPlan:
    """Returns the memory that one device needs for steps of a run, with the allocator that the environment asks for.

    Args:
        model: Without content, see :func:`meta_model`.
        objective: What it is trained for.
        options: Of the run.
        num_samples: Of one part of a rank's batch.
        latent_shape: Channels, frames, rows and columns.
        captions: Tokens of a caption, and its channels.
        world_size: Ranks.
    """
    parameters = list(model.parameters())
    batch = meta_batch(num_samples, latent_shape, captions, torch.bfloat16)
    working = working_bytes(model, objective, batch, gradient_shards=gradient_shards(options.parallel, world_size))
    plan = plan_memory(
        options.parallel,
        options.optimiser,
        num_weights=sum(t.numel() for t in (*parameters, *model.buffers())),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        world_size=world_size,
        working=working,
        inputs=batch.captions.nbytes + 2 * 4 * batch.latents.numel(),  # clean latents and noise are float32
    )
    return plan if segments_grow(os.environ) else replace(plan, fragmentation=FIXED_FRAGMENTATION)


def meta_model(config: ModelConfig, options: TrainConfig) -> DiffusionTransformer:
    """Returns a run's model without content, in its precision, in training mode, on the rank that has most tokens."""
    with torch.device("meta"):
        model = build_model(config, options)
    model.layout_for = busiest_layout(options.parallel.sequence_parallel, in_pieces=options.parallel.zero_stage < 3)
    return model.to(torch.bfloat16) if options.parallel.precision == "bfloat16" else model


def meta_batch(
    num_samples: int, latent_shape: tuple[int, int, int, int], captions: tuple[int, int], dtype: torch.dtype
) -> Batch:
    """Returns a batch without content.

    Args:
        num_samples: Of one part of a rank's batch.
        latent_shape: Channels, frames, rows and columns.
        captions: Tokens of a caption, and its channels.
        dtype: Of latents and captions as they are stored.
    """
    length, channels = captions

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return Batch(
        latents=empty(num_samples, *latent_shape, dtype=dtype),
        u=empty(num_samples, dtype=torch.float64),
        noise_keys=empty(num_samples, dtype=torch.int64),
        captions=empty(num_samples, 1, length, channels, dtype=dtype),
        mask=empty(num_samples, length, dtype=torch.int64),
        drop_caption=empty(num_samples, dtype=torch.bool),
        fps=empty(num_samples),
        height=empty(num_samples),
        width=empty(num_samples),
        identity=empty(num_samples, 2, dtype=torch.int64),
    )


def working_bytes(model: nn.Module, objective: Objective, batch: Batch, *, gradient_shards: int) -> int:
    """Returns the most bytes that a forward and a backward pass hold at once besides the weights.

    Among them are the batch, what the backward pass reads, what is temporary, and the gradients as they come: each
    whole while it is made, then a rank's part of it.

    Args:
        model: Without content, see :func:`meta_model`.
        objective: What it is trained for.
        batch: Without content.
        gradient_shards: Ranks that share the gradients.
    """
    allocations = Allocations()

    def keep_own_part(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        allocations.hold(gradient.numel() * gradient.element_size() // gradient_shards)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(keep_own_part) for p in model.parameters() if p.requires_grad]
    with allocations:
        allocations.leave_out(*model.parameters(), *model.buffers())
        noise = torch.empty(batch.latents.shape, dtype=torch.float32, device="meta")
        held = [tensor.clone() for tensor in (batch.latents, batch.captions, batch.mask)]
        wants_size = bool(getattr(model, "wants_size", False))
        batch_loss(model, objective, batch, wants_size=wants_size, noise=noise).loss.mean().backward()
        del held
    for handle in handles:
        handle.remove()
    return allocations.peak
