"""Speed and error of the encoders can be measured on any machine."""

from pathlib import Path

import pytest
import torch

from shared.encoders.benchmark import MEASURES, BenchmarkConfig, draw_lengths, table
from shared.errors import InputError


@pytest.mark.parametrize(("model", "plain"), [("t5-xxl", "transformers"), ("sd", "diffusers")])
def test_every_way_is_measured_and_gives_what_float32_gives(model: str, plain: str, tmp_path: Path) -> None:
    config = BenchmarkConfig(output=tmp_path / "speed.json", device="cpu", tiny=True, seconds=0.0)
    with torch.inference_mode():
        results = list(MEASURES[model](config))
    assert {result.way for result in results} == {plain, "ours"}
    assert all(result.rate > 0 for result in results)
    errors = [result.error for result in results if result.way == "ours" and result.error is not None]
    assert errors
    assert max(errors) < 1e-4
    lines = table(results).splitlines()
    assert len(lines) == 2 + len(results)
    assert "| 1.00 |" in lines[2]


def test_ways_are_measured_alone_and_unknown_ones_are_named(tmp_path: Path) -> None:
    config = BenchmarkConfig(output=tmp_path / "speed.json", ways=("ours",), device="cpu", tiny=True, seconds=0.0)
    with torch.inference_mode():
        results = [result for measure in MEASURES.values() for result in measure(config)]
    assert {(result.model, result.way) for result in results} == {("t5-xxl", "ours"), ("sd", "ours")}
    with pytest.raises(InputError, match="'theirs': expected some of 'transformers', 'transformers, compiled', 'ours'"):
        BenchmarkConfig(output=tmp_path / "speed.json", models=("t5-xxl",), ways=("ours", "theirs"))
    for way, reason in (("ours, GELU apart", "never fused"), ("ours, PyTorch's products", "no others")):
        alone = BenchmarkConfig(output=config.output, ways=(way,), device="cpu", tiny=True, seconds=0.0)
        with pytest.raises(InputError, match=reason), torch.inference_mode():
            list(MEASURES["t5-xxl"](alone))


def test_lengths_are_those_of_captions() -> None:
    lengths = draw_lengths(1000)
    assert 58 < sum(lengths) / len(lengths) < 62
    assert 5 <= min(lengths) < max(lengths) <= 120
