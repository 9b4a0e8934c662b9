"""Every command that the README shows is one that exists and takes these options."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro

from preprocess.config import PreprocessConfig
from preprocess.probe import ProbeConfig
from preprocess.verify import VerifyConfig
from shared.cache.__main__ import COMMANDS
from storage_estimates.config import EstimateConfig
from train.config import TrainConfig
from train.sampling.config import SampleConfig

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {
    "preprocess": PreprocessConfig,
    "shared.cache": COMMANDS,
    "preprocess.probe": ProbeConfig,
    "preprocess.verify": VerifyConfig,
    "storage_estimates": EstimateConfig,
    "train": TrainConfig,
    "train.sample": SampleConfig,
}


def commands() -> list[str]:
    """Returns the lines of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[:3] == ["ray", "job", "submit"] or words[0] in ("torchrun", "python")
    module = words.index("-m") + 1
    tyro.cli(OPTIONS[words[module]], args=words[module + 1 :])


def test_the_readme_shows_every_command_line() -> None:
    shown = {shlex.split(command)[shlex.split(command).index("-m") + 1] for command in commands() if " -m " in command}
    assert shown == set(OPTIONS)


def test_the_pictures_and_pages_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target


def test_a_second_make_installs_nothing_again() -> None:
    planned = subprocess.run(["make", "-n", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" not in planned or not list((ROOT / ".venv").glob(".ready-*"))
