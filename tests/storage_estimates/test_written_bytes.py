"""Predicted against written bytes, over containers and codecs: caches come from the real writer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache.layout import Container
from shared.spec import Bucket
from storage_estimates.bits import BitsTable
from storage_estimates.estimate import estimate
from storage_estimates.from_cache import measure
from tests.storage_estimates.written_cache import write_cache

CONTAINERS: tuple[Container, ...] = ("tar", "zarr")
WITHOUT_ENTROPY_CODING = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("int8@37", "int8@30"),
]
WITH_ENTROPY_CODING = [
    ("bfloat16+zstd", "bfloat16+zstd"),
    ("float16+zstd", "float16+zstd"),
    ("float32+zstd", "float32+zstd"),
    ("int8@37+zstd", "int8@30+zstd"),
    ("int8@37+delta+zstd", "int8@30+zstd"),
]


def bytes_on_disk(root: Path) -> int:
    """Returns the bytes of the shards and of the index."""
    return sum(
        path.stat().st_size for kind in ("shards", "index") for path in (root / kind).rglob("*.*") if path.is_file()
    )


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("latent", "text"), WITHOUT_ENTROPY_CODING)
def test_sizes_without_entropy_coding_are_predicted_within_one_percent(
    tmp_path: Path, latent: str, text: str, container: Container
) -> None:
    write_cache(tmp_path, latent_codec=latent, text_codec=text, container=container)
    measured = measure(str(tmp_path))
    assert measured.choice.container == container
    predicted = estimate(measured.groups, measured.encoders, measured.choice, BitsTable()).total_bytes
    assert predicted == pytest.approx(bytes_on_disk(tmp_path), rel=0.01)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("latent", "text"), WITH_ENTROPY_CODING)
def test_sizes_with_the_bits_that_a_cache_took_are_predicted_within_one_percent(
    tmp_path: Path, latent: str, text: str, container: Container
) -> None:
    write_cache(tmp_path, latent_codec=latent, text_codec=text, container=container)
    measured = measure(str(tmp_path))
    assert set(measured.bits.found) == {("latent", latent), ("text", text)}
    assert measured.predicted_bytes() == pytest.approx(bytes_on_disk(tmp_path), rel=0.01)


@pytest.mark.parametrize("container", CONTAINERS)
def test_both_moments_several_captions_and_other_columns_are_counted(tmp_path: Path, container: Container) -> None:
    write_cache(
        tmp_path,
        latent_codec="bfloat16",
        text_codec="bfloat16",
        container=container,
        posterior="mean+logvar",
        num_captions=3,
        manifest=True,
    )
    measured = measure(str(tmp_path))
    assert measured.choice.posterior == "mean+logvar"
    assert measured.predicted_bytes() == pytest.approx(bytes_on_disk(tmp_path), rel=0.01)


@pytest.mark.parametrize("container", CONTAINERS)
def test_many_small_samples_a_shard_are_predicted(tmp_path: Path, container: Container) -> None:
    write_cache(
        tmp_path,
        latent_codec="bfloat16",
        text_codec="bfloat16",
        container=container,
        bucket=Bucket(1, 64, 64),
        num_samples=400,
        shard_samples=400,
    )
    assert measure(str(tmp_path)).predicted_bytes() == pytest.approx(bytes_on_disk(tmp_path), rel=0.01)


def test_a_large_index_is_judged_by_some_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage_estimates.from_cache._MAX_ROWS", 40)
    write_cache(tmp_path, latent_codec="bfloat16", text_codec="bfloat16", num_samples=96)
    measured = measure(str(tmp_path))
    assert sum(group.num_samples for group in measured.groups) == 96
    assert measured.predicted_bytes() == pytest.approx(bytes_on_disk(tmp_path), rel=0.03)


def test_a_cache_is_compared_and_extrapolated_on_the_command_line(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", latent_codec="bfloat16+zstd", text_codec="bfloat16+zstd", container="zarr")
    found = json.loads(run("--cache", str(tmp_path / "cache"), "--clips", "48_000", "--json"))
    assert found["chosen"]["container"] == "zarr"
    assert found["chosen"]["latent_codec"] == "bfloat16+zstd"
    assert found["num_samples"] == 48_000
    assert found["chosen"]["total_bytes"] == pytest.approx(1000 * bytes_on_disk(tmp_path / "cache"), rel=0.02)
    assert f"{bytes_on_disk(tmp_path / 'cache'):,} bytes" in found["notes"][0]


def run(*arguments: str) -> str:
    """Returns what the command line prints."""
    command = [sys.executable, "-m", "storage_estimates", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
