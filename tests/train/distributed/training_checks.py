"""Checks of training on several ranks against one process with PyTorch alone, see ``training_cases``."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.train.distributed.step_checks import (  # noqa: F401  (one launch runs them too)
    a_step_that_is_not_finite_on_one_rank_is_taken_by_none,
    gradients_are_freed_as_the_stage_says,
    gradients_that_some_ranks_do_not_have_count_as_zero,
    steps_are_launched_without_waiting,
    steps_in_buckets_are_those_of_deepspeed,
)
from tests.train.distributed.training_cases import (
    BATCH,
    DECAY,
    LR,
    MODELS,
    SIZES,
    batch_of,
    config_of,
    objective_of,
    reference,
    require_same,
    rows_of,
    small_model,
    trained,
)
from tests.train.tape import recorder_for
from train.conditions import Conditions, denoiser
from train.config import TrainConfig
from train.data import Batch
from train.ema import Ema
from train.model.checkpointing import ACTIVATION_CHECKPOINTING
from train.parallel.lean_zero import Gathered, LeanZero
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine
from train.step import TrainingStep


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
    amounts = (*(("stdit-ti/2", amount) for amount in ACTIVATION_CHECKPOINTING[1:]), ("dit-ti/2", "attention"))
    for name, amount in amounts:
        found = trained(ranks, name, zero_stage=3, sequence_parallel=ranks.world_size, activation_checkpointing=amount)
        require_same(found, reference(name, ranks.device), what=f"{name}, {amount}")


def swapping_places_in_pieces_changes_nothing(ranks: Ranks, _folder: Path) -> None:
    """And what has come from other ranks is not sent again but by ``full``, which has kept nothing.

    At stage 3, where it goes at once, places divide, and it goes in parcels.
    """
    for name, stage, amount, num_exchanges in (
        # in each of two blocks there and back, forward and backward: two steps at once, one in two pieces
        ("stdit-ti/2", 2, "none", 32),
        ("stdit-ti/2", 2, "selective", 32),
        ("stdit-ti/2", 2, "attention", 32),
        ("stdit3-ti/2", 2, "full", 48),
        ("stdit-ti/2", 3, "selective", None),  # DeepSpeed has exchanges of its own
    ):
        options = {"sequence_parallel": ranks.world_size, "activation_checkpointing": amount}
        with (
            mock.patch("train.parallel.pieces.PIECE_TOKENS", 0),
            mock.patch("train.model.attention_layers.writes_parcels", return_value=True),
            mock.patch("torch.distributed.all_to_all_single", wraps=dist.all_to_all_single) as exchanges,
        ):
            found = trained(ranks, name, zero_stage=stage, **options)
        require_same(found, reference(name, ranks.device), what=f"{name} at stage {stage}, {amount}")
        assert num_exchanges in (exchanges.call_count, None), exchanges.call_count


def recorded_passes_are_those_launched_one_by_one(ranks: Ranks, _folder: Path) -> None:
    """With what they send: sums of gradients, by buckets of one owner and shared ones, and on GPUs tokens that change
    ranks, which a CPU's recorder cannot see."""
    numbers = (0, 0, 0, 2, 2, 0)
    places, have_gathered = [], LeanZero.have_gathered

    def noted(gradients: LeanZero, gathered: Gathered) -> None:
        places.append({(tensor.data_ptr(), tensor.numel()) for _, tensor in gathered})
        have_gathered(gradients, gathered)

    for name, stage, degree, shared in (
        ("stdit-ti/2", 1, 1, False),
        ("stdit-ti/2", 2, 1, False),
        ("stdit-ti/2", 2, 1, True),
        ("stdit-ti/2", 2, ranks.world_size, False),
        ("stdit3-ti/2", 2, ranks.world_size, True),
        ("dit-ti/2", 2, ranks.world_size, False),
    ):
        if degree > 1 and ranks.device.type == "cpu":
            continue
        with (
            mock.patch("train.parallel.lean_zero.BUCKET_ELEMENTS", 5003),
            mock.patch("train.parallel.lean_zero.SHARED_BELOW", 2**40 if shared else 0),
            mock.patch("train.parallel.pieces.PIECE_TOKENS", 0),
        ):
            options = {"numbers": numbers, "zero_stage": stage, "sequence_parallel": degree}
            expected = trained(ranks, name, **options)
            with mock.patch.object(LeanZero, "have_gathered", noted):
                found = trained(ranks, name, recorder=recorder_for(ranks.device), **options)
        assert places[-1] == places[-2], "two sizes, recorded one after the other, have the same places"
        require_same(found, expected, what=f"{name} at stage {stage}, {degree} ranks a sample, {shared=}")


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


def the_average_can_take_the_models_place(ranks: Ranks, _folder: Path) -> None:
    for stage in (0, 1, 2, 3):
        for precision in ("float32", "bfloat16"):
            config = config_of("stdit-ti/2", zero_stage=stage, precision=precision)
            ranks.share_samples(1, zero_stage=2)
            model = small_model("stdit-ti/2")
            engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
            objective = objective_of("stdit-ti/2")
            step, ema = TrainingStep(engine, model, objective), Ema(masters, DECAY)
            batch = batch_of(0).to(ranks.device)
            step.take(batch, LR, ema.following(0))
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
    ranks.share_samples(ranks.world_size, zero_stage=2)
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
