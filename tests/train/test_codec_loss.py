"""The benchmark of what codecs cost in loss: its runs are kept, and taken again for the same options only."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shared.errors import InputError
from train.benchmark.codec_loss import CodecLossBenchmark, _losses, codec_table, compare, main


def test_a_run_is_taken_again_and_not_for_other_options(ranks, small_cache, tmp_path):
    config = CodecLossBenchmark(
        manifest="unused", folder=tmp_path, steps=2, model_settings=("depth=1", "hidden_size=32", "num_heads=2")
    )
    losses = _losses(config, ranks, "run", cache=small_cache.url)
    assert len(losses) == 2
    assert _losses(config, ranks, "run", cache=small_cache.url) == losses
    with pytest.raises(InputError, match=r"the run there has lr=0.001 .*, this one has lr=0.01"):
        _losses(replace(config, lr=0.01), ranks, "run", cache=small_cache.url)


def test_several_ranks_are_refused_before_anything_is_made(ranks, tmp_path, monkeypatch):
    two = SimpleNamespace(world_size=2)
    monkeypatch.setattr("train.benchmark.codec_loss.join_ranks", lambda: nullcontext(two))
    with pytest.raises(InputError, match="compares runs of one device, found 2 ranks: run it alone"):
        main(["--manifest", "unused", "--folder", str(tmp_path / "folder")])
    assert not (tmp_path / "folder").exists()


def test_runs_are_compared_step_by_step_and_at_the_end():
    reference = [2.0] * 10 + [1.0] * 10
    row = compare("ours", [2.5] * 10 + [0.75] * 10, reference, 1000)
    assert (row.mean_loss, row.mean_difference, row.relative) == (1.625, 0.375, 0.25)
    assert row.final_difference == -0.25
    assert codec_table([row]).splitlines()[-1] == "| ours | 1 | 1.62500 | 3.75e-01 | 25.0000 % | -2.50e-01 |"
