"""Checks of training on several ranks against one process with PyTorch alone: losses, gradients, weights.

The reference is written out: the loss's mean over the whole batch, its gradient, clipped, into AdamW. Adam's epsilon is
large, so that weights follow gradients smoothly, and rounding stays rounding. Every weight is random, or zero gates
would hide the layers behind them. Each of three steps has a size of its own: odd ones, an image, places spread.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.conditions import Conditions, denoiser
from train.config import TrainConfig
from train.data import Batch
from train.diffusion.objective import Objective, create_objective
from train.ema import Ema, decay_at
from train.model import create_model
from train.parallel.master_weights import MOMENTS, MasterWeights
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine
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


def small_model(name: str) -> nn.Module:
    torch.manual_seed(5)
    model = create_model(
        name,
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


def trained(ranks: Ranks, name: str, **options: Any) -> Outcome:
    """Returns what the trainer's own step comes to on these ranks."""
    config = config_of(name, **options)
    ranks.share_samples(config.parallel.sequence_parallel)
    model = small_model(name)
    step_of = {"mask_ratios": mask_ratios_of(model), "accumulation": config.optimiser.gradient_accumulation}
    model.layout_for = ranks.sequence.layout_for  # type: ignore[assignment]
    engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
    step = TrainingStep(engine, model, objective_of(name), **step_of)  # type: ignore[arg-type]
    ema = Ema(masters, DECAY)
    losses, norms = [], []
    for number in range(len(SIZES)):
        whole = batch_of(number)
        mine = rows_of(whole, rank_slots(BATCH, ranks.data_rank, ranks.num_data_ranks))
        result = step.take(mine.to(ranks.device), LR)
        assert result.applied
        ema.update(number, result.verdict)
        by_rank = ranks.gather(result.terms.loss.detach().cpu())
        losses.append(torch.cat(by_rank[:: config.parallel.sequence_parallel]))
        norms.append(float(result.grad_norm))
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


def check_stages(ranks: Ranks, name: str, degree: int) -> None:
    expected = reference(name, ranks.device)
    for stage in (0, 1, 2, 3):
        found = trained(ranks, name, zero_stage=stage, sequence_parallel=degree)
        require_same(found, expected, what=f"{name} at stage {stage}, {degree} ranks a sample")


def stdit_at_every_stage(ranks: Ranks, _folder: Path) -> None:
    check_stages(ranks, "stdit-ti/2", ranks.world_size)


def stdit3_at_every_stage(ranks: Ranks, _folder: Path) -> None:
    check_stages(ranks, "stdit3-ti/2", ranks.world_size)


def dit_at_every_stage(ranks: Ranks, _folder: Path) -> None:
    check_stages(ranks, "dit-ti/2", ranks.world_size)


def plain_data_parallelism_at_every_stage(ranks: Ranks, _folder: Path) -> None:
    check_stages(ranks, "stdit-ti/2", 1)


def groups_and_parts_of_a_batch(ranks: Ranks, _folder: Path) -> None:
    """Some ranks share samples, others have other samples; and batches are computed in parts."""
    name, degree = "stdit-ti/2", ranks.world_size // 2
    for stage, parts in ((0, 2), (1, 2), (2, 2), (3, 2)):
        found = trained(ranks, name, zero_stage=stage, sequence_parallel=degree, gradient_accumulation=parts)
        require_same(found, reference(name, ranks.device), what=f"stage {stage}, {parts} parts, {degree}")


def recomputing_activations_changes_nothing(ranks: Ranks, _folder: Path) -> None:
    for amount in ("selective", "full"):
        found = trained(
            ranks, "stdit-ti/2", zero_stage=3, sequence_parallel=ranks.world_size, activation_checkpointing=amount
        )
        require_same(found, reference("stdit-ti/2", ranks.device), what=amount)


def bfloat16_keeps_float32_masters_at_every_stage(ranks: Ranks, _folder: Path) -> None:
    """All stages start at weights that are not rounded, and stay together."""
    exact = reference("stdit-ti/2", ranks.device)
    outcomes = [
        trained(ranks, "stdit-ti/2", zero_stage=stage, sequence_parallel=ranks.world_size, precision="bfloat16")
        for stage in (0, 1, 2, 3)
    ]
    for stage, outcome in enumerate(outcomes):
        for ours, theirs in zip(outcome.losses, exact.losses, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03, msg=lambda m, s=stage: f"stage {s}: {m}")
        weights = {name: value for name, value in outcome.values.items() if name.startswith("weights")}
        assert not any(torch.equal(value, value.bfloat16().float()) for value in weights.values()), stage
        for name, value in weights.items():
            error = float((value - exact.values[name]).abs().max())
            assert error < 0.3 * LR * len(SIZES), f"stage {stage}, {name}: {error}"


def steps_in_buckets_are_those_of_deepspeed(ranks: Ranks, _folder: Path) -> None:
    """Buckets of a few thousand values, so that parameters are cut, buffers wait, and ranks have several each."""
    for precision, rtol in (("float32", 2e-6), ("bfloat16", 2e-3)):
        options = {"precision": precision, "sequence_parallel": 1}
        with mock.patch("train.parallel.zero.uses_buckets", return_value=False):
            expected = trained(ranks, "stdit-ti/2", zero_stage=2, **options)
        for stage, largest in ((1, 5003), (2, 5003), (2, 2**25)):
            with mock.patch("train.parallel.lean_zero.BUCKET_ELEMENTS", largest):
                found = trained(ranks, "stdit-ti/2", zero_stage=stage, **options)
            what = f"{precision} at stage {stage}, buckets of {largest}"
            assert max(abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True)) < rtol, what
            for name, value in expected.values.items():
                error, scale = float((found.values[name] - value).abs().max()), float(value.abs().max())
                assert error <= 10 * rtol * (scale + 1e-3), f"{what}, {name}: off by {error} of {scale}"


def gradients_are_freed_as_the_stage_says(ranks: Ranks, _folder: Path) -> None:
    """After the backward pass: at stage 2 a rank holds what it owns, at stage 1 all, and after the step nothing."""
    ranks.share_samples(1)
    for stage in (1, 2):
        model = small_model("stdit-ti/2")
        with mock.patch("train.parallel.lean_zero.BUCKET_ELEMENTS", 5003):
            engine, masters = build_engine(
                model, config_of("stdit-ti/2", zero_stage=stage), ranks.device, ranks.world_size
            )
        step = TrainingStep(engine, model, objective_of("stdit-ti/2"))
        gathered = []
        model.x_embedder.proj.bias.register_post_accumulate_grad_hook(
            lambda _, model=model, gathered=gathered: gathered.append(sum(p.grad is None for p in model.parameters()))
        )
        engine.backward(step.loss(batch_of(0).to(ranks.device)).loss.mean())
        parameters, own = list(model.parameters()), sum(part.numel() for part in masters.parts().values())
        held = sum(gradient.numel() for _, gradient in engine.lean_zero._pieces)
        if stage == 2:
            assert all(p.grad is None for p in parameters)
            assert held == own
            assert gathered[0] > 0.8 * len(parameters)  # before the first layer's gradients came
        else:
            assert all(p.grad is not None for p in parameters)
            assert held == 0
        engine.step()
        assert all(p.grad is None for p in parameters)
        assert not engine.lean_zero._pieces


def a_step_that_is_not_finite_on_one_rank_is_taken_by_none(ranks: Ranks, _folder: Path) -> None:
    """The last bias alone has no finite gradient, from the last rank, which owns it."""
    ranks.share_samples(1)
    for stage in (1, 2):
        config = config_of("stdit-ti/2", zero_stage=stage, precision="bfloat16")
        model = small_model("stdit-ti/2")
        engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
        step, ema = TrainingStep(engine, model, objective_of("stdit-ti/2")), Ema(masters, DECAY)
        batch = batch_of(0).to(ranks.device)
        ema.update(0, step.take(batch, LR).verdict)
        before = {**whole_values(masters, ema), **{n: p.detach().clone() for n, p in model.named_parameters()}}
        factor = torch.inf if ranks.rank == ranks.world_size - 1 else 1.0
        broken = model.final_layer.linear.bias.register_hook(lambda gradient, factor=factor: gradient * factor)
        result = step.take(batch, LR)
        broken.remove()
        ema.update(1, result.verdict)
        assert not result.applied
        assert masters.steps() == 1
        after = {**whole_values(masters, ema), **dict(model.named_parameters())}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        result = step.take(batch, LR)
        assert result.applied
        assert masters.steps() == 2


def the_average_can_take_the_models_place(ranks: Ranks, _folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        for precision in ("float32", "bfloat16"):
            config = config_of("stdit-ti/2", zero_stage=stage, precision=precision)
            ranks.share_samples(1)
            model = small_model("stdit-ti/2")
            engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
            objective = objective_of("stdit-ti/2")
            step, ema = TrainingStep(engine, model, objective), Ema(masters, DECAY)
            batch = batch_of(0).to(ranks.device)
            ema.update(0, step.take(batch, LR).verdict)
            before = step.loss(batch).loss.detach().clone()
            averaged = small_model("stdit-ti/2").to(ranks.device)
            for name, parameter in averaged.named_parameters():
                parameter.data.copy_(masters.gather(ema.parts, name, to=None))
            if precision == "bfloat16":
                averaged.bfloat16()
            with torch.no_grad(), ema.applied():
                found = step.loss(batch).loss
            expected = TrainingStep(averaged, averaged, objective).loss(batch).loss.detach()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found, before, rtol=1e-3)
            torch.testing.assert_close(step.loss(batch).loss.detach(), before, rtol=0, atol=0)


def each_sample_sees_its_own_frames_and_captions(ranks: Ranks, _folder: Path) -> None:
    """What went wrong in published sequence parallelism, each by itself."""
    ranks.share_samples(ranks.world_size)
    for name in MODELS:
        model = small_model(name).to(ranks.device).eval()
        model.layout_for = ranks.sequence.layout_for  # type: ignore[assignment]
        batch = batch_of(0).to(ranks.device)
        whole = predicted(model, batch)
        for row in range(BATCH):  # batches above one; captions of unequal length
            alone = rows_of(batch, slice(row, row + 1))
            torch.testing.assert_close(predicted(model, alone), whole[row : row + 1], rtol=1e-4, atol=1e-5)
        other = dataclasses.replace(batch, captions=batch.captions.clone())
        other.captions[0] += 1
        changed = predicted(model, other)
        assert not torch.allclose(changed[0], whole[0], atol=1e-3)
        torch.testing.assert_close(changed[1:], whole[1:], rtol=0, atol=1e-6)
        if name.startswith("dit"):
            continue
        for key, parameter in model.named_parameters():
            if "attn_temp.proj" in key or ("temporal_blocks" in key and "attn.proj" in key and "cross" not in key):
                parameter.data.zero_()
        whole = predicted(model, batch)  # now frames see nothing of each other
        other = dataclasses.replace(batch, latents=batch.latents.clone())
        other.latents[:, :, 0] += 1
        changed = predicted(model, other)
        assert not torch.allclose(changed[:, :, 0], whole[:, :, 0], atol=1e-3)
        torch.testing.assert_close(changed[:, :, 1:], whole[:, :, 1:], rtol=0, atol=1e-6)


@torch.no_grad()
def predicted(model: nn.Module, batch: Batch) -> Tensor:
    denoise = denoiser(model, Conditions.of_batch(batch), wants_size=getattr(model, "wants_size", False))
    return denoise(batch.latents, 1000 * batch.u.float())


def a_run_goes_on_with_other_ranks(ranks: Ranks, folder: Path) -> None:
    """The run beside this folder, which one rank began: here at another stage, its samples shared."""
    from train.trainer import train  # needs more packages than the other checks

    options = json.loads((folder.parent / "options.json").read_text())
    config = TrainConfig.of(output=folder.parent / "run", **options)
    train(config.changed(steps=3, zero_stage=3, sequence_parallel=ranks.world_size), ranks)
    train(config.changed(zero_stage=1, gradient_accumulation=2), ranks)


def offloading_changes_nothing(ranks: Ranks, _folder: Path) -> None:
    for stage, what in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        found = trained(ranks, "stdit-ti/2", zero_stage=stage, sequence_parallel=ranks.world_size, offload=what)
        require_same(found, reference("stdit-ti/2", ranks.device), what=f"stage {stage}, {what}")
