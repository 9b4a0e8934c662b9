"""Rates, the hours that they give, and how many samples a shard takes."""

import json
from pathlib import Path

import pytest

from shared.costs import (
    PEAK_TFLOPS,
    T5_XXL_RATE,
    VAE_RATES,
    EncodeRate,
    gpu_seconds,
    stdit_step_seconds,
    t5_rate,
)
from shared.shard_size import MAX_GPU_SECONDS, MAX_SHARD_BYTES, most_samples_a_shard, samples_a_shard

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "encode_rates_h200.json"


def test_rates_are_those_of_the_benchmark_that_they_name() -> None:
    report = json.loads(MEASURED.read_text())
    assert report["gpu"] == "NVIDIA H200"
    eager = {(case["model"], case["size"]): case for case in report["cases"] if case["mode"] == "eager"}
    for name, rate in VAE_RATES.items():
        measured = eager["sd" if name == "sdxl" else name, 512]["pixels_per_second"]
        assert rate.per_second == pytest.approx(measured, rel=0.005), name
    assert T5_XXL_RATE.per_second == pytest.approx(eager["t5-xxl", 120]["tokens_per_second"], rel=0.005)


def test_an_unmeasured_gpu_is_scaled_by_its_peak() -> None:
    rate = EncodeRate(per_second=100.0, source="here")
    assert gpu_seconds(1000.0, rate) == 10.0
    assert gpu_seconds(1000.0, rate, "A100") == pytest.approx(10 * PEAK_TFLOPS["H200"] / PEAK_TFLOPS["A100"])


def test_a_narrower_t5_is_faster_by_the_square_of_its_width() -> None:
    assert t5_rate(2048).per_second == pytest.approx(4 * T5_XXL_RATE.per_second)
    assert t5_rate(4096) is T5_XXL_RATE


def test_t5_doubles_an_image_step_and_hardly_touches_a_long_clip() -> None:
    seconds = gpu_seconds(120, EncodeRate(per_second=57.6e3, source="compiled"))
    image = stdit_step_seconds(frames=1, height=256, width=256, text_tokens=120)
    clip = stdit_step_seconds(frames=64, height=512, width=512, text_tokens=120)
    assert seconds / image == pytest.approx(0.95, abs=0.1)
    assert seconds / clip == pytest.approx(0.0035, abs=0.0005)


@pytest.mark.parametrize("sample_bytes", [10_000, 2_588_672, 600_000_000, 5_000_000_000])
@pytest.mark.parametrize("sample_pixels", [65_536, 64 * 512 * 512, 10**11])
@pytest.mark.parametrize("rate", [1e7, 4.7e7])
def test_a_shard_has_at_most_1_gb_and_three_minutes_of_a_gpu(
    sample_bytes: int, sample_pixels: int, rate: float
) -> None:
    usual, most = (
        count(sample_bytes=sample_bytes, sample_pixels=sample_pixels, pixels_per_second=rate)
        for count in (samples_a_shard, most_samples_a_shard)
    )
    assert 1 <= usual <= most
    if most > 1:
        assert most * sample_bytes <= MAX_SHARD_BYTES
        assert most * sample_pixels / rate <= MAX_GPU_SECONDS
