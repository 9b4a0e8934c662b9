"""Checks of gradients and steps at ZeRO 1 and 2, which several ranks make together."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.train.distributed.training_cases import (
    CHANNELS,
    CLIP,
    DECAY,
    LR,
    MODELS,
    TEXT_CHANNELS,
    TOKENS,
    batch_of,
    config_of,
    mask_ratios_of,
    objective_of,
    small_model,
    trained,
    whole_values,
)
from train.ema import Ema
from train.metrics import Totals
from train.model import create_model
from train.model.transformer import DiffusionTransformer
from train.parallel.master_weights import MasterWeights
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine, take_step
from train.step import TrainingStep


def steps_in_buckets_are_those_of_deepspeed(ranks: Ranks, _folder: Path) -> None:
    """Buckets of a few thousand values, so that parameters are cut, buffers wait, and ranks have several each, or share
    one."""
    for precision, first_rtol, rtol in (("float32", 2e-6, 2e-6), ("bfloat16", 5e-4, 4e-3)):
        options = {"precision": precision, "sequence_parallel": 1}
        with mock.patch("train.parallel.zero.uses_buckets", return_value=False):
            expected = trained(ranks, "stdit-ti/2", zero_stage=2, **options)
        for stage, largest, shared in (
            (1, 5003, False),
            (2, 5003, False),
            (2, 2**25, False),
            (1, 2**25, True),
            (2, 5003, True),
        ):
            with (
                mock.patch("train.parallel.lean_zero.BUCKET_ELEMENTS", largest),
                mock.patch("train.parallel.lean_zero.SHARED_BELOW", 2**40 if shared else 0),
            ):
                found = trained(ranks, "stdit-ti/2", zero_stage=stage, **options)
            what = f"{precision} at stage {stage}, {'shared ' * shared}buckets of {largest}"
            errors = [abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True)]
            assert errors[0] < first_rtol, what  # later ones are of weights that differ already
            assert max(errors) < rtol, what
            for name, value in expected.values.items():
                error, scale = float((found.values[name] - value).abs().max()), float(value.abs().max())
                assert error <= 10 * rtol * (scale + 1e-3), f"{what}, {name}: off by {error} of {scale}"


def _in_small_buckets(
    ranks: Ranks, stage: int, *, shared: bool = False
) -> tuple[DiffusionTransformer, Any, MasterWeights]:
    model = small_model("stdit-ti/2")
    with (
        mock.patch("train.parallel.lean_zero.BUCKET_ELEMENTS", 5003),
        mock.patch("train.parallel.lean_zero.SHARED_BELOW", 2**40 if shared else 0),
    ):
        engine, masters = build_engine(model, config_of("stdit-ti/2", zero_stage=stage), ranks.device, ranks.world_size)
    return model, engine, masters


def gradients_are_freed_as_the_stage_says(ranks: Ranks, _folder: Path) -> None:
    """After the backward pass: at stage 2 a rank holds what it owns, at stage 1 all, and after the step nothing."""
    ranks.share_samples(1, zero_stage=2)
    for stage, shared in itertools.product((1, 2), (False, True)):
        model, engine, masters = _in_small_buckets(ranks, stage, shared=shared)
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


def gradients_that_some_ranks_do_not_have_count_as_zero(ranks: Ranks, _folder: Path) -> None:
    """Each parameter but the last two is used by one rank alone, so that buckets are complete at other times."""
    ranks.share_samples(1, zero_stage=2)
    for stage, shared in itertools.product((1, 2), (False, True)):
        model, engine, masters = _in_small_buckets(ranks, stage, shared=shared)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = [parameter.detach().clone() for parameter in parameters]
        engine.backward(sum(p.square().sum() for p in parameters[ranks.rank : -2 : ranks.world_size]))
        norm, verdict = take_step(engine, model)
        assert verdict.wait()
        used = [2 / ranks.world_size * weight for weight in weights[:-2]]
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(used))
        moments = masters.moments("exp_avg")
        found = [masters.gather(moments, name, to=None) for name in masters.trained]
        factor = 0.1 * min(1.0, CLIP / norm.item())
        expected = [factor * gradient for gradient in used] + [torch.zeros_like(weight) for weight in weights[-2:]]
        for moment, right in zip(found, expected, strict=True):
            torch.testing.assert_close(moment, right, rtol=1e-5, atol=1e-7)


def a_step_that_is_not_finite_on_one_rank_is_taken_by_none(ranks: Ranks, _folder: Path) -> None:
    """The last bias alone has no finite gradient, from the last rank, which owns it."""
    ranks.share_samples(1, zero_stage=2)
    for stage in (1, 2):
        config = config_of("stdit-ti/2", zero_stage=stage, precision="bfloat16")
        model = small_model("stdit-ti/2")
        engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
        step, ema = TrainingStep(engine, model, objective_of("stdit-ti/2")), Ema(masters, DECAY)
        batch = batch_of(0).to(ranks.device)
        step.take(batch, LR, ema.following(0))
        before = {**whole_values(masters, ema), **{n: p.detach().clone() for n, p in model.named_parameters()}}
        factor = torch.inf if ranks.rank == ranks.world_size - 1 else 1.0
        broken = model.final_layer.linear.bias.register_hook(lambda gradient, factor=factor: gradient * factor)
        result = step.take(batch, LR, ema.following(1))
        broken.remove()
        assert not result.applied
        assert masters.steps() == 1
        after = {**whole_values(masters, ema), **dict(model.named_parameters())}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        result = step.take(batch, LR)
        assert result.applied
        assert masters.steps() == 2


def steps_are_launched_without_waiting(ranks: Ranks, _folder: Path) -> None:
    """On GPUs, where PyTorch raises an error if something waits. A verdict comes when the next step is launched."""
    ranks.share_samples(1, zero_stage=2)
    for name in MODELS:
        for stage in (1, 2):
            model = create_model(
                name,
                depth=2,
                hidden_size=128,  # heads as wide as our kernels take them
                num_heads=4,
                caption_channels=TEXT_CHANNELS,
                model_max_length=TOKENS,
                in_channels=CHANNELS,
            )
            config = config_of(name, zero_stage=stage, precision="bfloat16")
            engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
            objective, ema = objective_of(name), Ema(masters, DECAY)
            step = TrainingStep(engine, model, objective, mask_ratios=mask_ratios_of(model))
            totals, before, whole = Totals(ranks.device, objective.parts), None, batch_of(0)
            tensors = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
            pinned = {key: value.pin_memory() for key, value in tensors.items() if isinstance(value, Tensor)}
            batch = dataclasses.replace(whole, **pinned)
            try:
                for number in range(5):
                    if number == 2:  # kernels are compiled, tables are made
                        torch.cuda.synchronize()
                        torch.cuda.set_sync_debug_mode("error")
                    result = step.take(batch.to(ranks.device), LR, ema.following(number))
                    totals.add(result, batch, model.config, 0.0)  # type: ignore[arg-type]
                    if before is not None:
                        assert before.wait()
                    before = result.verdict
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert result.applied
            assert masters.steps() == 5
