"""DeepSpeed: its configuration in one place, and its float32 master weights by parameter.

Under ZeRO each rank holds a part of the master weights. What is computed from them value by value, such as an average,
is computed on the parts, and put together only to be saved.
"""

import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import TrainConfig


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a run."""
    return {
        "train_batch_size": world_size
        * config.optimiser.gradient_accumulation,  # read by its timers only: the batch sizes are the plan's
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.optimiser.gradient_accumulation,
        "gradient_clipping": config.optimiser.gradient_clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "bf16": {"enabled": config.parallel.precision == "bfloat16"},
        "steps_per_print": None,
    }


def build_engine(model: nn.Module, config: TrainConfig, device: torch.device, world_size: int) -> Any:
    """Returns the DeepSpeed engine of a model that lies on the CPU; it moves it, casts it and shards its state.

    The optimiser is PyTorch's: DeepSpeed's own is compiled at first use.
    """
    # An all-reduce for inference on one CPU host, which no training step calls: DeepSpeed would compile it for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        model.to(device).parameters(),
        lr=config.optimiser.lr,
        betas=config.optimiser.adam_betas,
        eps=config.optimiser.adam_eps,
        weight_decay=config.optimiser.weight_decay,
        fused=device.type == "cuda",
    )
    # DeepSpeed's collectives are deprecated under another name in this PyTorch; nothing that a user could act on.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor.*|.*reduce_scatter_tensor.*", FutureWarning)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, world_size), dist_init_required=False
    )
    return engine


def take_step(engine: Any, model: nn.Module) -> tuple[Tensor, bool]:
    """Takes the optimiser's step with the gradients at hand, unless they are no finite numbers.

    Returns their norm before clipping, and whether the step was taken: both are the same on all ranks.
    """
    if engine.zero_optimization_stage() == 0:  # where DeepSpeed clips without keeping the norm or looking at it
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not norm.isfinite():
            engine.zero_grad()
            engine.micro_steps += 1  # as its step does, so that it counts the parts of the next batch right
            return norm, False
        engine.step()
        return norm, True
    engine.step()  # DeepSpeed looks at the norm in the other stages
    return torch.as_tensor(engine.get_global_grad_norm()), bool(engine.was_step_applied())


class MasterWeights:
    """The float32 weights of a model under ZeRO stages 0 to 2, and which part of them this rank holds.

    Args:
        model: Already inside an engine.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        # DeepSpeed links a parameter to its part of the masters; without such a link it is its own master.
        self._is_sharded = any(hasattr(p, "_hp_mapping") for p in self._parameters.values())

    def parts(self) -> dict[str, Tensor]:
        """Returns this rank's part of the weights, flat and in float32, by parameter."""
        if not self._is_sharded:
            return {name: p.detach().view(-1) for name, p in self._parameters.items()}
        return {name: link.hp_fragment.detach() for name, link in self._links().items()}

    def own_parts_of(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what of whole weights belongs to this rank, flat, by parameter."""
        flat = {name: weights[name].reshape(-1) for name in self._parameters}
        if not self._is_sharded:
            return flat
        addresses = {name: link.lp_fragment_address for name, link in self._links().items()}
        return {name: flat[name][at.start : at.start + at.numel] for name, at in addresses.items()}

    def gather(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the whole tensors of which each rank gives its parts, on the CPU of rank 0; nothing elsewhere.

        All ranks call it.
        """
        links = self._links() if self._is_sharded else {}
        whole = {}
        for name, parameter in self._parameters.items():
            if not self._is_sharded:
                values = parts[name]
            else:
                values = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if name in links:
                    at = links[name].lp_fragment_address
                    values[at.start : at.start + at.numel] = parts[name]
                dist.all_reduce(values)
            if dist.get_rank() == 0:
                whole[name] = values.view(parameter.shape).to("cpu", copy=True)
        return whole

    def _links(self) -> dict[str, Any]:
        links = {name: p._hp_mapping for name, p in self._parameters.items()}  # type: ignore[attr-defined]
        return {name: link for name, link in links.items() if link is not None}


def gather_sharded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a model under ZeRO stage 3 in float32, on the CPU of rank 0; nothing elsewhere.

    All ranks call it. One parameter at a time is put together.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                whole[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return whole
