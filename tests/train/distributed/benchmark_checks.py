"""Checks of the step benchmark that two ranks make together; see :mod:`tests.train.distributed.launch`."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import InputError
from train.benchmark import online, products_loss, step_command
from train.benchmark.measuring import measure
from train.benchmark.step_command import StepBenchmark
from train.benchmark.step_settings import STDIT, Setting
from train.benchmark.steps import Bench, Timing
from train.benchmark.variants import FUSED
from train.parallel.ranks import Ranks

TINY: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "caption_channels": 16, "model_max_length": 130}
QUICK = Timing(warmup=0, steps=1)


def _setting(name: str) -> Setting:
    return next(each for each in STDIT if each.name == name)


def _tiny(name: str) -> Setting:
    return dataclasses.replace(_setting(name), size=32, frames=4, batch=3)


def rows_count_what_each_rank_does(ranks: Ranks, folder: Path) -> None:
    for name in ("stdit-xl/2 256x512, 2 GPUs a sample", "stdit-xl/2 16x256, 2 GPUs"):
        setting = _tiny(name)
        (row,) = measure(setting, ranks, QUICK, overrides=TINY, trace=folder, device_memory_gib=80)
        assert (row.num_ranks, row.recomputed) == (2, "none")
        a_rank = 3 * 4 * 2 * 2 / setting.sequence_parallel
        assert row.tokens_per_second * row.step_ms / 1000 == pytest.approx(a_rank)
        assert ranks.gather(row.step_ms) == [row.step_ms] * 2
        assert row.parts_ms["time"] > 0
        bench = Bench(setting, ranks, TINY, None)
        assert row.tflops * row.step_ms * 1e9 == pytest.approx(bench.flop() / setting.sequence_parallel)
        latents = [batch.latents for batch in bench._batches]
        first, second = ranks.gather(latents)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert same == (setting.sequence_parallel == 2)
        bench.close()
    assert ranks.rank > 0 or len(list(folder.glob("*.json"))) == 2


def ranks_compute_again_what_the_smallest_device_asks_for(ranks: Ranks, _folder: Path) -> None:
    setting = _tiny("stdit-xl/2 256x512, 2 GPUs a sample")
    bench = Bench(setting, ranks, TINY, None, device_memory_gib=80 if ranks.is_first else 0.1)
    bench.set_up(FUSED)
    assert str(bench.recomputation) == "full"
    bench.step()
    bench.close()


def what_is_measured_on_one_device_is_refused_on_two(ranks: Ranks, _folder: Path) -> None:
    """Before anything is read: there is no cache."""
    for benchmark, arguments in ((products_loss, ["--cache", "none"]), (online, [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark, "join_ranks", partial(nullcontext, ranks))
            with pytest.raises(InputError, match=r"one (device|GPU).* found 2 ranks"):
                benchmark.main(arguments)


def several_ranks_stand_beside_one(ranks: Ranks, _folder: Path) -> None:
    settings = tuple(f"{name}={value}" for name, value in TINY.items())
    config = StepBenchmark(timing=QUICK, model_settings=settings, device_memory_gib=80)
    setting = dataclasses.replace(_setting("stdit-xl/2 16x256, 2 GPUs"), batch=1, checkpointing="auto")
    one, two = step_command._measure("stdit", setting, ranks, config)
    assert (one.setting, one.num_ranks, one.batch) == ("stdit-xl/2 16x256", 1, 1)
    assert (two.setting, two.num_ranks, two.batch) == ("stdit-xl/2 16x256, 2 GPUs", 2, 1)
    assert two.times_one_rank == pytest.approx(2 * one.step_ms / two.step_ms)
    assert one.times_one_rank is None


def one_rank_has_too_little_memory(ranks: Ranks, _folder: Path) -> None:
    seconds = Bench.seconds

    def or_fail(bench: Bench, timing: Timing) -> float:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError
        return seconds(bench, timing)  # waits for rank 1

    Bench.seconds = or_fail  # type: ignore[method-assign]
    measure(_tiny("stdit-xl/2 16x256, 2 GPUs"), ranks, QUICK, overrides=TINY, trace=None)
