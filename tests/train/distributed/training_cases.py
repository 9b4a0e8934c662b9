"""What training on several ranks is compared with: one process with PyTorch alone; losses, gradients, weights.

The reference is written out: the loss's mean over the whole batch, its gradient, clipped, into AdamW. Adam's epsilon is
large, so that weights follow gradients smoothly, and rounding stays rounding. Every weight is random, or zero gates
would hide the layers behind them. Each of three steps has a size of its own: odd ones, an image, places spread.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.data import Batch
from train.diffusion.objective import Objective, create_objective
from train.ema import Ema, decay_at
from train.model import create_model
from train.model.checkpointing import ActivationCheckpointing
from train.parallel.master_weights import MOMENTS, MasterWeights
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine
from train.pass_graphs import Recorder
from train.plan import rank_slots
from train.step import TrainingStep

SIZES = ((5, 6, 10), (1, 6, 10), (4, 4, 6))
"""Latent frames, rows and columns of each step's batch; the patch is (1, 2, 2)."""
MODELS = ("stdit-ti/2", "stdit3-ti/2", "dit-ti/2")
BATCH, TOKENS, TEXT_CHANNELS, CHANNELS = 4, 7, 16, 4
LR, CLIP, EPSILON, DECAY, WEIGHT_DECAY = 1e-2, 0.5, 1e-2, 0.9, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What three steps come to."""

    losses: list[Tensor]
    """Of each step, of each sample of the whole batch."""
    norms: list[float]
    values: Mapping[str, Tensor]
    """Weights, moments and average after the steps, by kind and parameter."""


def config_of(model: str, **options: Any) -> TrainConfig:
    return TrainConfig.of(
        cache="none",
        output=Path("none"),
        model=model,
        lr=LR,
        gradient_clip=CLIP,
        adam_eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
        **{"precision": "float32", **options},
    )


def small_model(name: str, *, activation_checkpointing: ActivationCheckpointing = "none") -> nn.Module:
    torch.manual_seed(5)
    model = create_model(
        name,
        activation_checkpointing=activation_checkpointing,
        depth=2,
        hidden_size=32,
        num_heads=4,
        caption_channels=TEXT_CHANNELS,
        model_max_length=TOKENS,
        in_channels=CHANNELS,
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model


def batch_of(step: int) -> Batch:
    """Returns a step's whole batch: ragged captions, one of them a single token, one dropped."""
    generator = torch.Generator().manual_seed(step)
    size, rows = SIZES[step], torch.arange(BATCH)
    lengths = torch.tensor([TOKENS, 1, 3, 5])
    mask = (torch.arange(TOKENS) < lengths[:, None]).int()
    captions = torch.randn(BATCH, 1, TOKENS, TEXT_CHANNELS, generator=generator) * mask[:, None, :, None]
    return Batch(
        latents=torch.randn(BATCH, CHANNELS, *size, generator=generator),
        u=torch.rand(BATCH, generator=generator, dtype=torch.float64),
        noise_keys=rows + 10 * step,
        captions=captions,
        mask=mask,
        drop_caption=rows == 2,
        fps=torch.full((BATCH,), 8.0),
        height=torch.full((BATCH,), 8.0 * size[1]),
        width=torch.full((BATCH,), 8.0 * size[2]),
        identity=torch.stack([rows, rows], 1),
    )


def rows_of(batch: Batch, rows: slice) -> Batch:
    tensors = {f.name: v[rows] for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return dataclasses.replace(batch, **tensors)


def objective_of(name: str) -> Objective:
    return create_objective(None, model=name, spatial_stride=8)


def mask_ratios_of(model: nn.Module) -> dict[Any, float] | None:
    return {"identity": 0.5, "image_head": 0.5} if getattr(model, "wants_size", False) else None


@cache
def reference(name: str, device: torch.device) -> Outcome:
    model = small_model(name).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = TrainingStep(model, model, objective_of(name), mask_ratios=mask_ratios_of(model))
    losses, norms = [], []
    for number in range(len(SIZES)):
        terms = step.loss(batch_of(number).to(device))
        optimizer.zero_grad()
        terms.loss.mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        for n, p in model.named_parameters():
            average[n].lerp_(p.detach(), 1 - decay_at(number, DECAY))
        losses.append(terms.loss.detach().cpu())
    values = {f"weights {n}": p.detach() for n, p in model.named_parameters()}
    values |= {f"average {n}": value for n, value in average.items()}
    for n, p in model.named_parameters():
        values |= {f"{key} {n}": optimizer.state[p][key] for key in MOMENTS}
    return Outcome(losses=losses, norms=norms, values={n: v.cpu().clone() for n, v in values.items()})


def trained(
    ranks: Ranks,
    name: str,
    *,
    numbers: Sequence[int] = range(len(SIZES)),
    recorder: Recorder | None = None,
    **options: Any,
) -> Outcome:
    """Returns what the trainer's own step comes to on these ranks, with batches by their numbers."""
    config = config_of(name, **options)
    ranks.share_samples(config.parallel.sequence_parallel, zero_stage=config.parallel.zero_stage)
    model = small_model(name, activation_checkpointing=config.parallel.recomputation.mode)
    step_of = {"mask_ratios": mask_ratios_of(model), "accumulation": config.optimiser.gradient_accumulation}
    step_of["recorder"] = recorder
    model.layout_for = ranks.sequence.layout_for  # type: ignore[assignment]
    engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
    step = TrainingStep(engine, model, objective_of(name), **step_of)  # type: ignore[arg-type]
    ema = Ema(masters, DECAY)
    losses, norms = [], []
    for count, number in enumerate(numbers):
        whole = batch_of(number)
        mine = rows_of(whole, rank_slots(BATCH, ranks.data_rank, ranks.num_data_ranks))
        result = step.take(mine.to(ranks.device), LR, ema.following(count))
        assert result.applied
        by_rank = ranks.gather(result.terms.loss.detach().cpu())
        losses.append(torch.cat(by_rank[:: config.parallel.sequence_parallel]))
        norms.append(float(result.grad_norm))
    step.give_memory_back()
    return Outcome(losses=losses, norms=norms, values=whole_values(masters, ema))


def whole_values(masters: MasterWeights, ema: Ema) -> dict[str, Tensor]:
    kinds = {"weights": masters.parts(), "average": ema.parts} | {key: masters.moments(key) for key in MOMENTS}
    values = {}
    for kind, parts in kinds.items():
        for name in masters.trained:
            whole = masters.gather(parts, name, to=None)
            assert whole is not None
            values[f"{kind} {name}"] = whole.detach().cpu().clone()
    return values


def require_same(found: Outcome, expected: Outcome, *, what: str) -> None:
    rtol = 2e-4 if torch.cuda.is_available() else 2e-5  # kernels for GPUs sum in an order that depends on the shape
    for step, (ours, theirs) in enumerate(zip(found.losses, expected.losses, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=lambda m, s=step: f"{what}, loss {s}: {m}")
    assert max(abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True)) < 10 * rtol, (
        what,
        found.norms,
        expected.norms,
    )
    assert found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        error = float((found.values[name] - value).abs().max())
        scale = float(value.abs().max())
        assert error <= 30 * rtol * (scale + 1e-3), f"{what}, {name}: off by {error} of {scale}"
