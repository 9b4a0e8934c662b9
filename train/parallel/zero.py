"""DeepSpeed's engine: configured, built and stepped in one place."""

import warnings
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.parallel.buckets import uses_buckets
from train.parallel.lean_zero import LeanZero
from train.parallel.master_weights import Following, MasterWeights
from train.parallel.verdict import Verdict


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a run."""
    parallel, num_parts = config.parallel, config.optimiser.gradient_accumulation
    settings: dict[str, Any] = {
        "train_batch_size": world_size * num_parts,  # read by its timers only: the batch sizes are the plan's
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_parts,
        "gradient_clipping": config.optimiser.gradient_clip,
        "zero_optimization": {"stage": parallel.zero_stage},
        "bf16": {"enabled": _is_bfloat16(config)},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice a step
    }
    if num_parts > 1 and parallel.zero_stage:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if parallel.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused Adam for CPUs needs no compiler
    if parallel.offload == "all":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings


def build_engine(
    model: nn.Module, config: TrainConfig, device: torch.device, world_size: int
) -> tuple[Any, MasterWeights]:
    """Returns the DeepSpeed engine of a model that lies on the CPU in float32, and its master weights.

    The engine moves the model, casts it and shards its state; the masters start at the model's weights, not rounded.
    The optimiser is PyTorch's: DeepSpeed's own is compiled at first use.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()} if _is_bfloat16(config) else {}
    # An all-reduce for inference on one CPU host, which no training step calls: DeepSpeed would compile it for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        model.to(device).parameters(),
        lr=0.0,  # each step sets its own; DeepSpeed takes one with zeros as it starts
        betas=config.optimiser.adam_betas,
        eps=config.optimiser.adam_eps,
        weight_decay=config.optimiser.weight_decay,
        fused=device.type == "cuda" or config.parallel.offload != "none",
    )
    # DeepSpeed's collectives are deprecated under another name in this PyTorch; nothing that a user could act on.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", FutureWarning)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world_size), dist_init_required=False
    )
    lean = uses_buckets(config.parallel, config.optimiser)
    engine.lean_zero = LeanZero(engine, max_norm=config.optimiser.gradient_clip) if lean else None
    masters = MasterWeights(engine, model, device)
    for name, weight in weights.items():
        masters.fill(masters.parts(), name, weight)
    return engine, masters


def _is_bfloat16(config: TrainConfig) -> bool:
    return config.parallel.precision == "bfloat16"


def take_step(engine: Any, model: nn.Module, following: Following | None = None) -> tuple[Tensor, Verdict]:
    """Takes the optimiser's step with the gradients at hand, unless they are no finite numbers.

    Args:
        engine: DeepSpeed's.
        model: The module inside it.
        following: An average that follows the step if it is taken.

    Returns:
        The gradient's norm before clipping, and whether the step was taken: both are the same on all ranks.
    """
    lean: LeanZero | None = engine.lean_zero
    if lean is not None:
        lean.following = following
        engine.step()
        assert lean.verdict is not None
        return lean.norm, lean.verdict
    norm, applied = _step_of_deepspeed(engine, model)
    if applied and following is not None:
        following.follow()
    return norm, Verdict.of(applied, next(model.parameters()).device)


def _step_of_deepspeed(engine: Any, model: nn.Module) -> tuple[Tensor, bool]:
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # DeepSpeed then clips without looking at the norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not norm.isfinite():
            engine.zero_grad()
            engine.micro_steps += 1  # as its step does, so that it counts the parts of the next batch right
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm()), bool(engine.was_step_applied())
