"""The command line: the published case, the headline, every form of output, its speed and its errors."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storage_estimates.config import EstimateConfig, Gpu, Preset
from storage_estimates.presets import PRESETS

KNOWN_CASE = ["--clips", "10_000_000", "--frames", "64", "--size", "512", "--tokens", "120"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line."""
    return subprocess.run(
        [sys.executable, "-m", "storage_estimates", *arguments], capture_output=True, text=True, check=False
    )


def answer(*arguments: str) -> Any:
    """Returns what the command line prints as JSON."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_published_figures_come_first_and_the_screen_is_short() -> None:
    lines = run(*KNOWN_CASE).stdout.splitlines()
    assert "983,040 bytes" in lines[1]
    assert "4,194,304 bytes" in lines[2]
    assert "51.8 TB" in lines[3]
    assert lines[3].endswith('"50 TB"')
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert sum(line.startswith("Recommendation: ") for line in lines) == 1


@pytest.mark.parametrize(("mean_tokens", "terabytes"), [([], 12), (["--mean-tokens", "60"], 10)])
@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_ten_million_clips_fit_the_promised_bytes(mean_tokens: list[str], terabytes: int, container: str) -> None:
    chosen = answer(*KNOWN_CASE, *mean_tokens, "--container", container)["chosen"]
    assert chosen["latent_codec"].startswith("int8")
    assert 0.7 * terabytes * 1e12 < chosen["total_bytes"] <= terabytes * 1e12
    assert 0 < chosen["overhead_bytes"] < 5000


def test_plain_codecs_take_their_exact_bytes() -> None:
    sizes = {size["latent_codec"]: size for size in answer(*KNOWN_CASE)["sizes"]}
    assert sizes["float32"]["latent_bytes"] == 4_194_304
    assert sizes["bfloat16"]["latent_bytes"] == 2_097_152
    assert sizes["bfloat16"]["text_bytes"] == 983_040


def test_the_whole_posterior_takes_twice_the_latent_bytes() -> None:
    sizes = answer(*KNOWN_CASE)["sizes"]
    one, two = (
        next(size for size in sizes if size["posterior"] == posterior and size["latent_codec"].startswith("int8"))
        for posterior in ("sample", "mean+logvar")
    )
    assert two["latent_bytes"] == pytest.approx(2 * one["latent_bytes"], abs=2)


def test_latents_pay_and_texts_of_long_clips_do_not() -> None:
    found = answer(*KNOWN_CASE)
    latents, texts = found["costs"]
    assert latents["break_even_epochs"] < 2
    assert texts["break_even_epochs"] > 5
    assert latents["gpu_hours_online"] == pytest.approx(5 * latents["gpu_hours_once"])
    assert "H200" in latents["rate_source"].upper()
    assert found["recommendation"].startswith("Cache: latents and texts together pay after ")


def test_texts_weigh_on_a_step_of_images_and_not_on_one_of_clips() -> None:
    image, clip = (
        answer("--clips", "1000", "--frames", frames, "--size", size)["costs"][1]["step_share"]
        for frames, size in (("1", "256"), ("64", "512"))
    )
    assert image > 0.9
    assert clip < 0.01


def test_the_users_own_rates_and_prices_count() -> None:
    slow = ["--vae-frames-per-second", "100", "--t5-tokens-per-second", "1000", "--gpu-hour-price", "2"]
    latents, texts = answer(*KNOWN_CASE, *slow, "--gpu", "A100")["costs"]
    assert latents["gpu_hours_once"] == pytest.approx(10e6 * 64 / 100 / 3600)
    assert latents["encode_dollars"] == pytest.approx(2 * latents["gpu_hours_once"])
    assert texts["gpu_hours_once"] == pytest.approx(10e6 * 120 / 1000 / 3600)


def test_all_lists_every_autoencoder_codec_container_and_posterior() -> None:
    listed = answer(*KNOWN_CASE, "--all")["all"]
    assert {each["autoencoder"] for each in listed} == {preset.label for preset in PRESETS.values()}
    assert len(listed) == len(PRESETS) * 4 * 2 * 2
    assert all(each["num_objects"] == 2 * each["num_shards"] + 2 for each in listed)


def test_csv_has_the_rows_of_the_table() -> None:
    rows = list(csv.DictReader(run(*KNOWN_CASE, "--csv").stdout.splitlines()))
    assert [int(row["total_bytes"]) for row in rows] == [size["total_bytes"] for size in answer(*KNOWN_CASE)["sizes"]]


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    assert run(*KNOWN_CASE, "--plot", str(tmp_path / "estimate.png")).returncode == 0
    with Image.open(tmp_path / "estimate.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100


def test_a_preset_that_takes_other_clips_says_so() -> None:
    found = answer(*KNOWN_CASE, "--vae-preset", "wan2.1")
    assert found["notes"] == ["Wan 2.1 takes 61x512x512 of 64x512x512"]
    assert found["sizes"][0]["latent_bytes"] == 16 * 16 * 64 * 64 * 4


@pytest.mark.parametrize("arguments", [["--help"], KNOWN_CASE, [*KNOWN_CASE, "--all"]])
def test_it_starts_without_torch_and_pyarrow(arguments: list[str]) -> None:
    check = (
        "import sys, runpy\n"
        f"sys.argv = ['storage_estimates', *{arguments}]\n"
        "try: runpy.run_module('storage_estimates', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pyarrow', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)))\n"
    )
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --clips"),
        (["--clips", "0"], "--clips 0: expected at least 1"),
        (["--clips", "5", "--size", "wide"], "--size 'wide': expected a number of pixels"),
        (["--clips", "5", "--size", "256x"], "--size '256x': expected a number of pixels"),
        (["--clips", "5", "--mean-tokens", "121"], "--mean-tokens 121"),
        (["--clips", "5", "--storage", "tape"], "expected one of s3-standard"),
        (["--clips", "5", "--latent-codec", "int9"], "codec 'int9'"),
        (["--clips", "5", "--text-codec", "int8@30+delta+zstd"], "a text has no frames"),
        (["--clips", "5", "--tokenizer", "demo:t5"], "--tokenizer without --manifest"),
        (["--clips", "5", "--gpu", "L40S"], "give --gpu-hour-price"),
        (["--clips", "5", "--prices", "nowhere.toml"], "nowhere.toml: not readable"),
        (["--manifest", "nowhere.csv", "--tokenizer", "demo:t5"], "nowhere.csv: no such file"),
        (["--cache", "nowhere"], "nowhere"),
        (["--clips", "5", "--json", "--csv"], "expected one of them"),
        (["--clips", "5", "--epochs", "nan"], "--epochs nan: expected more than 0"),
        (["--clips", "5", "--plot", "no/such/folder/a.png"], "not written"),
    ],
)
def test_what_is_wrong_is_one_clear_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_options_name_every_preset_and_gpu() -> None:
    assert set(Preset.__args__) == set(PRESETS)  # type: ignore[attr-defined]
    assert "H200" in Gpu.__args__  # type: ignore[attr-defined]
    assert EstimateConfig(clips=1).container == "tar"
