"""Every command that the README and the pages on training show is one that exists and takes these options."""

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
from train.config.command_line import parse_command_line
from train.export import ExportConfig
from train.sampling.config import SampleConfig

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {
    "preprocess": PreprocessConfig,
    "shared.cache": COMMANDS,
    "preprocess.probe": ProbeConfig,
    "preprocess.verify": VerifyConfig,
    "storage_estimates": EstimateConfig,
    "train": TrainConfig,
    "train.export": ExportConfig,
    "train.sample": SampleConfig,
}
PAGES = ("docs/finetune.md", "docs/training.md")


def commands(page: str = "README.md") -> list[str]:
    """Returns the lines of a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
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


@pytest.mark.parametrize("command", [command for page in PAGES for command in commands(page)])
def test_a_command_of_the_pages_on_training_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    if module != "train":
        tyro.cli(OPTIONS[module], args=arguments)
        return
    (tmp_path / "run.json").write_text('{"cache": "/data/cache"}')
    (tmp_path / "mine.yaml").write_text("lr: 2e-5")
    monkeypatch.chdir(tmp_path)
    parse_command_line([word.replace("/data/run/run.json", "run.json") for word in arguments])


def test_the_readme_shows_every_command_line() -> None:
    shown = {shlex.split(command)[shlex.split(command).index("-m") + 1] for command in commands() if " -m " in command}
    assert shown == set(OPTIONS)


def test_the_pictures_and_pages_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target


def test_a_second_make_installs_nothing_again() -> None:
    planned = subprocess.run(["make", "-n", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" not in planned or not list((ROOT / ".venv").glob(".ready-*"))
