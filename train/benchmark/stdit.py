"""``python -m train.benchmark stdit``: videos by DiT, STDiT and STDiT3, see :mod:`train.benchmark.step_command`."""

from collections.abc import Sequence

from train.benchmark.step_command import run
from train.benchmark.step_settings import STDIT


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code."""
    return run("stdit", STDIT, arguments)
