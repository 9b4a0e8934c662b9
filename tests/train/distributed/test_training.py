"""Training on several ranks against one process: one launch of two ranks for all, more ranks and GPUs apart."""

import json

import pytest

from tests.train.distributed.check_names import ON_FOUR, TRAINING_CHECKS, TRAINING_MODULE
from tests.train.distributed.launch import run_checks
from tests.train.test_trainer import losses
from train.config import TrainConfig
from train.trainer import train

OPTIONS = {
    "model": "stdit-ti/2",
    "model_settings": ("depth=2", "hidden_size=32", "num_heads=2"),
    "precision": "float32",
    "batch_size": 4,
    "steps": 6,
    "lr": 1e-3,
    "ema_decay": 0.9,
    "log_every": 1,
    "num_workers": 0,
    "peak_tflops": 1.0,
}


@pytest.fixture(scope="module")
def run_on_two_ranks(ranks, small_cache, tmp_path_factory: pytest.TempPathFactory):
    """A run that one rank begins, two ranks go on with, and one rank ends; and what became of all checks."""
    folder = tmp_path_factory.mktemp("training")
    config = TrainConfig.of(cache=small_cache.url, output=folder / "run", **OPTIONS)
    train(config.changed(steps=2), ranks)
    (folder / "options.json").write_text(json.dumps(OPTIONS | {"cache": small_cache.url, "steps": 4}))
    return config, run_checks(TRAINING_MODULE, TRAINING_CHECKS, folder, num_ranks=2)


@pytest.mark.parametrize("check", TRAINING_CHECKS)
def test_on_two_ranks(run_on_two_ranks, check):
    assert run_on_two_ranks[1][check] == "ok"


def test_a_run_goes_on_with_other_ranks_and_stages_and_the_same_losses(run_on_two_ranks, ranks, small_cache, tmp_path):
    config, _ = run_on_two_ranks
    train(config, ranks)
    whole = TrainConfig.of(cache=small_cache.url, output=tmp_path / "run", **OPTIONS)
    train(whole, ranks)
    expected, found = losses(whole.output), losses(config.output)
    assert [row[0] for row in found] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_on_four_ranks(tmp_path):
    assert run_checks(TRAINING_MODULE, ON_FOUR, tmp_path, num_ranks=4) == dict.fromkeys(ON_FOUR, "ok")
