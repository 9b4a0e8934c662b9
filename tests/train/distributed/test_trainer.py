"""The trainer on two ranks: what is no finite number, and evaluations."""

import json
from pathlib import Path

import pytest

from tests.train.distributed.launch import run_checks
from tests.train.distributed.trainer_checks import config_for, lines, online_config
from train.trainer import train

MODULE = "tests.train.distributed.trainer_checks"
CHECKS = [
    "a_step_that_is_no_finite_number_anywhere_is_taken_nowhere",
    "a_run_that_stops_says_once_which_sample_it_was",
    "an_evaluation_on_two_ranks_is_that_of_one",
    "clips_encoded_online_give_each_rank_its_part_of_the_batch",
    "a_damaged_checkpoint_is_told_once_whichever_rank_looks_at_it",
    "a_sample_that_one_rank_cannot_read_is_told_once",
    "an_error_of_one_rank_ends_all_and_is_told_by_the_first",
    "every_rank_waits_for_the_slowest_ones_batch",
    "products_in_8_bits_of_samples_that_are_shared_are_those_of_one_rank",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[str, str]:
    return run_checks(MODULE, CHECKS, folder, num_ranks=2)


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(on_two_ranks, check):
    assert on_two_ranks[check] == "ok"


def test_an_evaluation_on_one_rank_is_that_of_two(on_two_ranks, folder, ranks):
    found = json.loads((folder / CHECKS[2] / "found.json").read_text())
    config = config_for(ranks, folder / "one", broken=0, holdout="60%", evaluate_every=1, evaluate_samples=5)
    config = config.changed(steps=2, precision="float32")
    train(config, ranks)
    own = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    for mine, other in zip(own, found, strict=True):
        for name in mine:
            if name.startswith("eval"):
                assert other[name] == pytest.approx(mine[name], rel=1e-4), name


def test_clips_encoded_online_by_one_rank_give_the_losses_of_two(on_two_ranks, folder, ranks):
    found = json.loads((folder / CHECKS[3] / "found.json").read_text())
    config = online_config(folder / "online-one")
    train(config, ranks)
    assert found == pytest.approx([line["loss"] for line in lines(config.output)], rel=1e-5)


@pytest.mark.multigpu
def test_on_two_gpus(tmp_path):
    checks = [*CHECKS, "ranks_whose_run_had_graphs_leave_their_group"]
    assert run_checks(MODULE, checks, tmp_path, num_ranks=2, device="cuda") == dict.fromkeys(checks, "ok")
