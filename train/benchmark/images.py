"""``python -m train.benchmark images``: images of 256x256, see :mod:`train.benchmark.step_command`."""

from collections.abc import Sequence

from train.benchmark.step_command import run
from train.benchmark.step_settings import IMAGES


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code."""
    return run("images", IMAGES, arguments)
