"""Passes that are recorded once and launched as one."""

import dataclasses
import json
import weakref
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from shared.errors import InputError
from tests.train.distributed.training_cases import (
    DECAY,
    LR,
    MODELS,
    TOKENS,
    batch_of,
    config_of,
    mask_ratios_of,
    objective_of,
    small_model,
    whole_values,
)
from tests.train.tape import TapeRecorder
from train.config import OptimiserOptions, ParallelOptions
from train.ema import Ema
from train.parallel.lean_zero import LeanZero
from train.pass_graphs import CudaRecorder, PassInputs
from train.planning.memory import plan_memory
from train.setup import check_run, plan_run
from train.step import TrainingStep
from train.trainer import train

PLANNED = {"data_rank": 0, "num_data_ranks": 1, "device_type": "cpu"}
SIZES = (0, 0, 0, 1, 1, 0, 0, 1)
"""Of the batches of a run's steps, by their number."""


def batches(ranks):
    """All different, with captions of several lengths."""
    for step, size in enumerate(SIZES):
        batch = batch_of(size)
        length = (TOKENS, 5, 3)[step % 3]
        mask = batch.mask[:, :length]
        latents, captions = batch.latents + 0.1 * step, batch.captions[:, :, :length] * (step + 1)
        yield dataclasses.replace(
            batch, latents=latents, captions=captions, mask=mask, noise_keys=batch.noise_keys + 100 * step
        ).to(ranks.device)


def run(ranks, build_engine, name, recorder, **options):
    """Losses, norms and all weights of a run."""
    model = small_model(name, activation_checkpointing=options.pop("checkpointing", "none"))
    engine, masters = build_engine(model, config_of(name, **options), ranks.device, ranks.world_size)
    step = TrainingStep(engine, model, objective_of(name), mask_ratios=mask_ratios_of(model), recorder=recorder)
    ema = Ema(masters, DECAY)
    results = [step.take(batch, LR, ema.following(n)) for n, batch in enumerate(batches(ranks))]
    assert all(result.applied for result in results)
    losses = torch.stack([torch.stack([r.terms.loss, *r.terms.parts.values()]) for r in results])
    return losses, torch.stack([result.grad_norm for result in results]), whole_values(masters, ema)


def losses(metrics):
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def build_engine(ranks):
    from train.parallel.zero import build_engine

    ranks.share_samples(1, zero_stage=2)
    return build_engine


@pytest.mark.parametrize("name", MODELS)
def test_steps_by_recordings_are_those_launched_one_by_one(ranks, build_engine, name):
    expected = run(ranks, build_engine, name, None)
    recorder = TapeRecorder()
    losses, norms, values = run(ranks, build_engine, name, recorder)
    assert recorder.played == len(SIZES) - 2  # the first of each size is not
    assert recorder.recorded == 3  # the first size twice: the second, when it was new, took its place
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-7)  # captions are padded further
    torch.testing.assert_close(norms, expected[1], rtol=1e-5, atol=0)
    for key, value in values.items():
        torch.testing.assert_close(value, expected[2][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("stage", [1, 2])
def test_it_holds_with_either_stage_of_zero_and_what_is_computed_again(ranks, build_engine, stage):
    for mode in ("selective", "attention", "full"):
        options = {"zero_stage": stage, "checkpointing": mode, "precision": "bfloat16"}
        expected = run(ranks, build_engine, "stdit-ti/2", None, **options)
        found = run(ranks, build_engine, "stdit-ti/2", TapeRecorder(), **options)
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=0)


def test_a_shape_that_is_new_gives_up_the_recordings_and_their_memory(ranks, build_engine):
    recorder = TapeRecorder()
    run(ranks, build_engine, "stdit-ti/2", recorder)
    assert recorder.given_back == 1  # at the fourth step; there was nothing to give back at the first
    assert recorder.recorded == 3  # the first size twice: the second, when it was new, took its place


def test_all_recordings_read_and_write_at_the_same_places_which_go_with_them(ranks, build_engine, monkeypatch):
    model = small_model("stdit-ti/2")
    engine, _ = build_engine(model, config_of("stdit-ti/2"), ranks.device, 1)
    step = TrainingStep(engine, model, objective_of("stdit-ti/2"), recorder=TapeRecorder())
    places, have_gathered = [], LeanZero.have_gathered
    read, in_room = [], PassInputs.in_room

    def put(self, room):
        read.append({name: tensor.data_ptr() for name, tensor in room.items()})
        memory.extend(weakref.ref(tensor) for tensor in room.values())
        return in_room(self, room)

    def noted(self, gathered):
        places.append([(tensor.data_ptr(), tensor.numel()) for _, tensor in gathered])
        memory.extend(weakref.ref(tensor) for _, tensor in gathered)
        have_gathered(self, gathered)

    memory = []
    monkeypatch.setattr(LeanZero, "have_gathered", noted)
    monkeypatch.setattr(PassInputs, "in_room", put)
    for size in (0, 1, 0, 1):
        step.take(batch_of(size).to(ranks.device), LR)
    assert len(places) == 2
    assert places[0] == places[1] != []
    assert read[0] == read[1] != {}
    assert all(each() is not None for each in memory)
    step.give_memory_back()
    assert not any(each() is not None for each in memory)


@pytest.fixture
def recorders(monkeypatch):
    """Those of runs with graphs, which a CPU then takes."""
    made = []

    def recorder():
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setattr("train.trainer.CudaRecorder", recorder)
    monkeypatch.setattr("train.trainer.check_run", lambda config, ranks: plan_run(config, **PLANNED))
    return made


def test_an_evaluation_has_the_memory_of_graphs(ranks, small_config, recorders):
    config = small_config.changed(buckets=("2x32x32",), evaluate_every=3, evaluate_samples=1, holdout="40%")
    folder = small_config.output
    runs = [config.changed(output=folder / str(graphs), cuda_graphs=graphs) for graphs in (False, True)]
    assert [train(run, ranks) for run in runs] == [0, 0]
    (recorder,) = recorders
    assert recorder.given_back == 2  # before the evaluations after steps 3 and 6
    assert recorder.played == 5
    assert recorder.recorded == 2
    plain, recorded = (losses(run.output / "metrics.jsonl") for run in runs)
    assert recorded == pytest.approx(plain, rel=1e-4)


def test_a_run_gives_up_its_graphs_at_its_end_whichever_it_is(ranks, small_config, recorders, monkeypatch):
    """NCCL lets no rank leave its group before."""
    config = small_config.changed(buckets=("2x32x32",), cuda_graphs=True)
    assert train(config, ranks) == 0
    monkeypatch.setattr("train.trainer.Checkpointer.save", Mock(side_effect=InputError("the disk is full")))
    with pytest.raises(InputError, match="the disk is full"):
        train(config.changed(output=config.output / "other"), ranks)
    assert [(recorder.recorded, recorder.given_back) for recorder in recorders] == [(1, 1), (1, 1)]


def test_a_recorded_step_that_is_not_finite_is_not_taken(ranks, build_engine):
    model = small_model("stdit-ti/2")
    engine, masters = build_engine(model, config_of("stdit-ti/2"), ranks.device, 1)
    step = TrainingStep(engine, model, objective_of("stdit-ti/2"), recorder=TapeRecorder())
    batch = batch_of(0).to(ranks.device)
    broken = dataclasses.replace(batch, latents=batch.latents * torch.inf)
    taken = [step.take(each, LR).applied for each in (batch, batch, broken, batch)]
    assert taken == [True, True, False, True]
    assert masters.steps() == 3
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_captions_that_are_too_long_are_refused_as_without_graphs(ranks, build_engine):
    model = small_model("stdit-ti/2")
    engine, _ = build_engine(model, config_of("stdit-ti/2"), ranks.device, 1)
    batch = batch_of(0)
    captions, mask = F.pad(batch.captions, (0, 0, 0, 2)), F.pad(batch.mask, (0, 2))
    long = dataclasses.replace(batch, captions=captions, mask=mask).to(ranks.device)
    for recorder in (None, TapeRecorder()):
        step = TrainingStep(engine, model, objective_of("stdit-ti/2"), recorder=recorder)
        with pytest.raises(InputError, match=f"captions of {TOKENS + 2} tokens, but model_max_length={TOKENS}"):
            step.take(long, LR)


def test_what_cannot_be_recorded_is_refused_before_training(small_config, ranks):
    with pytest.raises(InputError, match="cuda_graphs needs a GPU, found cpu: leave it out"):
        check_run(small_config.changed(cuda_graphs=True), ranks)
    for stage in (0, 3):
        with pytest.raises(InputError, match=f"cuda_graphs needs zero_stage 1 or 2 and no offload, found .*={stage}"):
            ParallelOptions(cuda_graphs=True, zero_stage=stage)
    with pytest.raises(InputError, match="found zero_stage=2, offload=optimizer"):
        ParallelOptions(cuda_graphs=True, offload="optimizer")
    with pytest.raises(InputError, match="cuda_graphs does not go with gradient_accumulation=2"):
        small_config.changed(cuda_graphs=True, gradient_accumulation=2)


def test_the_count_of_memory_has_the_places_that_graphs_read_and_write():
    counts = {"num_weights": 1000, "num_trained": 900, "world_size": 3, "working": 5000}
    plain, graphs = (
        plan_memory(ParallelOptions(cuda_graphs=wanted), OptimiserOptions(), inputs=70, **counts)
        for wanted in (False, True)
    )
    assert graphs.resident - plain.resident == 2 * 300 + 70


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["none", "selective", "attention", "full"])
def test_steps_by_graphs_are_those_launched_one_by_one(ranks, build_engine, name, mode):
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 3e-2)):
        options = {"precision": precision, "checkpointing": mode}
        expected = run(ranks, build_engine, name, None, **options)
        found = run(ranks, build_engine, name, CudaRecorder(), **options)
        torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found[1], expected[1], rtol=3 * tolerance, atol=0)


@pytest.mark.gpu
def test_the_memory_of_graphs_is_that_of_one_pass_and_comes_back(ranks, build_engine):
    model = small_model("stdit-ti/2")
    engine, _ = build_engine(model, config_of("stdit-ti/2"), ranks.device, 1)
    step = TrainingStep(engine, model, objective_of("stdit-ti/2"), recorder=CudaRecorder())
    large = dataclasses.replace(
        batch_of(0), latents=F.interpolate(batch_of(0).latents, scale_factor=(1, 16, 16), mode="nearest")
    ).to(ranks.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    step.take(large, LR)
    alone = torch.cuda.memory_reserved() - before
    for _ in range(3):
        step.take(large, LR)
    assert torch.cuda.memory_reserved() - before < 1.5 * alone
    small = batch_of(1).to(ranks.device)
    step.take(small, LR)
    assert torch.cuda.memory_reserved() - before < 0.5 * alone
