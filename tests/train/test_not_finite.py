"""Losses and gradients that are no finite numbers: the weights do not take them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import write_cache
from train.batches import open_batches
from train.checkpoint_files import EMA_FILE, OPTIMISER_FILE, WEIGHTS_FILE, list_checkpoints
from train.diffusion.terms import LossTerms
from train.not_finite import NotFiniteGuard
from train.parallel.verdict import Verdict
from train.setup import check_run
from train.step import StepResult, _poisoned_unless_finite
from train.trainer import train

SOUND, BROKEN = Bucket(2, 32, 32), Bucket(3, 32, 48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Clips of one bucket whose latents overflow, among sound ones."""
    root = tmp_path_factory.mktemp("nan") / "cache"
    write_cache(root, {SOUND: 9}, codecs=("float32", "float32"))
    return write_cache(root, {BROKEN: 3}, codecs=("float32", "float32"), seed=7, latent_scale=1e37)


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stops_and_names_step_samples_and_checkpoint(ranks, small_config, cache):
    config = small_config.changed(cache=cache.url, batch_size=3, steps=40, checkpoint_every=1)
    with pytest.raises(InputError, match=r"step (\d+): the loss is no finite number for 3x32x48-7-\d.mp4") as raised:
        train(config, ranks)
    step = int(str(raised.value).split(":")[0].removeprefix("step "))
    expected = f"goes on from step-{step - 1:08d}:" if step > 1 else "goes on from its beginning:"
    assert expected in str(raised.value)
    assert "--on-nan skip" in str(raised.value)
    kept = list_checkpoints(config.output)
    assert [c.name for c in kept][-1:] == ([f"step-{step - 1:08d}"] if step > 1 else [])


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32", "zero_stage": 0},
        {"precision": "float32", "zero_stage": 2},
        {"zero_stage": 1},
        {"zero_stage": 2, "gradient_accumulation": 3},
        {"zero_stage": 3, "ema_decay": None},
    ],
    ids=str,
)
def test_steps_that_are_left_out_change_nothing_and_are_counted(ranks, small_config, cache, capsys, changes):
    config = small_config.changed(
        cache=cache.url, batch_size=3, steps=12, on_nan="skip", checkpoint_every=1, keep_checkpoints=99, **changes
    )
    assert train(config, ranks) == 0
    steps = lines(config.output)
    left_out = [line["step"] for line in steps if line["nan_steps"]]
    assert 0 < len(left_out) < 12
    assert [line["step"] for line in steps if line["loss"] is None] == left_out  # NaN is no JSON
    assert capsys.readouterr().out.count("left out, the weights stay as they were") == len(left_out)
    weights = [load_file(checkpoint / WEIGHTS_FILE) for checkpoint in list_checkpoints(config.output)]
    for step in range(2, 13):
        before, after = weights[step - 2], weights[step - 1]
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step in left_out), step
    assert all(bool(torch.isfinite(value).all()) for value in weights[-1].values())


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_in_a_row_end_the_run(ranks, small_config, cache, log_every):
    config = small_config.changed(
        cache=cache.url,
        buckets=(str(BROKEN),),
        batch_size=3,
        steps=9,
        on_nan="skip",
        max_nan_steps=3,
        log_every=log_every,
    )
    with pytest.raises(InputError, match=r"step 3: .*, as in 3 steps in a row; the run goes on from its beginning"):
        train(config, ranks)


def test_what_is_saved_seldom_has_no_step_that_was_not_looked_at(ranks, small_config, cache, capsys):
    """Steps are looked at while the next one is being launched, and all of them before a line, a save or the end."""
    common = {"cache": cache.url, "batch_size": 3, "steps": 12, "on_nan": "skip", "ema_decay": 0.9}
    outcomes = {}
    for every in (1, 12):
        config = small_config.changed(
            output=small_config.output / str(every), log_every=every, checkpoint_every=every, **common
        )
        assert train(config, ranks) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "left out, the weights" in line]
        last = list_checkpoints(config.output)[-1]
        outcomes[every] = told, sum(line["nan_steps"] for line in lines(config.output)), last
    assert outcomes[1][:2] == outcomes[12][:2]
    assert outcomes[12][1] == len(outcomes[12][0]) > 0
    for name in (WEIGHTS_FILE, EMA_FILE, OPTIMISER_FILE):
        often, seldom = ((outcome[2] / name).read_bytes() for outcome in outcomes.values())
        assert often == seldom, name


def test_the_last_step_is_looked_at_before_it_is_saved(ranks, small_config, cache):
    config = small_config.changed(cache=cache.url, buckets=(str(BROKEN),), batch_size=3, steps=1, log_every=9)
    with pytest.raises(InputError, match="step 1: the loss is no finite number"):
        train(config, ranks)
    assert list_checkpoints(config.output) == []


def test_an_infinite_loss_has_no_finite_gradient_and_a_finite_loss_its_own():
    weight = torch.tensor([2.0], requires_grad=True)
    _poisoned_unless_finite(weight.sum() + torch.inf).backward()
    assert weight.grad.isnan().all()
    weight.grad = None
    _poisoned_unless_finite((3 * weight).sum()).backward()
    assert weight.grad.tolist() == [3.0]


def test_finite_losses_under_an_infinite_gradient_are_told_apart(ranks, small_config):
    guard = NotFiniteGuard(small_config.optimiser, ranks, sources=lambda names: {}, last_saved=lambda: None)
    (batch, *_) = open_batches(check_run(small_config, ranks), ranks, first_step=0)
    terms = LossTerms(loss=torch.ones(len(batch)))
    result = StepResult(terms=terms, grad_norm=torch.tensor(torch.inf), verdict=Verdict(torch.tensor(0.0)))
    guard.check(8, batch, result)  # the device may not have taken it yet
    with pytest.raises(InputError, match="step 8: the losses are finite, and the gradient's norm is not; the run goes"):
        guard.settle()


def test_a_learning_rate_that_is_far_too_high_ends_the_run_before_it_is_saved(ranks, small_config):
    config = small_config.changed(lr=1e30, steps=20, precision="float32")
    with pytest.raises(InputError, match=r"step \d+: the loss"):
        train(config, ranks)
    assert list_checkpoints(config.output) == []


def test_a_batch_in_parts_gives_the_losses_and_weights_of_a_whole_one(ranks, small_config):
    runs = {}
    for parts in (1, 2):
        config = small_config.changed(
            output=small_config.output / str(parts), precision="float32", gradient_accumulation=parts
        )
        train(config, ranks)
        runs[parts] = lines(config.output), load_file(list_checkpoints(config.output)[-1] / WEIGHTS_FILE)
    for whole, split in zip(runs[1][0], runs[2][0], strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4), name
    for name, weight in runs[1][1].items():
        torch.testing.assert_close(runs[2][1][name], weight, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="gradient_accumulation=3 does not divide the 4 samples that a rank takes"):
        train(small_config.changed(gradient_accumulation=3), ranks)
