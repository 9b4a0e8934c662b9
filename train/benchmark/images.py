"""``python -m train.benchmark images``: images of 256x256, see :mod:`train.benchmark.step_command`."""

from collections.abc import Sequence

from train.benchmark.step_command import run
from train.benchmark.step_settings import IMAGES

ABOUT = """Measures training on images of 256x256: DiT with class labels and with captions, and STDiT; each as published
code runs it (plain), with fused parts one by one, and as this project runs it.
"""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, writes the results and returns the exit code."""
    return run("images", IMAGES, arguments, about=ABOUT)
