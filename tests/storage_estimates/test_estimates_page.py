"""docs/estimates.md shows what the estimator prints, and commands that it understands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import tyro

from storage_estimates.config import EstimateConfig
from storage_estimates.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "estimates.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def run(*arguments: str) -> str:
    """Returns what the command line prints."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_the_screen_of_the_page_is_what_its_command_prints() -> None:
    (screen,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert run(*COMMANDS[0][1:]) == screen


def test_the_table_of_autoencoders_is_what_the_estimator_says() -> None:
    arguments = [*COMMANDS[0][1:], "--all", "--json"]
    full, half = (json.loads(run(*arguments, *more))["all"] for more in ([], ["--mean-tokens", "60"]))
    for preset in PRESETS.values():
        (row,) = re.findall(rf"^\| {re.escape(preset.label)} \|.*$", PAGE, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]

        def total(
            listed: list[dict[str, object]], codec: str, posterior: str = "sample", of: str = preset.label
        ) -> str:
            (found,) = (
                each["total_bytes"]
                for each in listed
                if (each["autoencoder"], each["container"]) == (of, "tar")
                and (each["latent_codec"], each["posterior"]) == (codec, posterior)
            )
            assert isinstance(found, int)
            return f"{found / 1e12:.1f}"

        small = "int8@40+delta+zstd"
        assert cells[1] == str(preset.geometry.latent_channels)
        assert cells[3:8] == [
            total(full, "float32"),
            total(full, "bfloat16+zstd"),
            total(full, small),
            total(full, small, "mean+logvar"),
            total(half, small),
        ]


def test_every_command_of_the_page_is_understood() -> None:
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        assert command[:3] == ["python", "-m", "storage_estimates"]
        tyro.cli(EstimateConfig, args=command[3:])
