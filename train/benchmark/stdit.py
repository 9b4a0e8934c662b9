"""``python -m train.benchmark stdit``: videos by DiT, STDiT and STDiT3, see :mod:`train.benchmark.step_command`."""

from collections.abc import Sequence

from train.benchmark.step_command import run
from train.benchmark.step_settings import STDIT

ABOUT = """Measures training on videos: STDiT, DiT and STDiT3, each as this project runs it and as published code does
(plain). Under torchrun --nproc-per-node 2: STDiT of 262,144 tokens over two GPUs, and two GPUs against one.
"""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, writes the results and returns the exit code."""
    return run("stdit", STDIT, arguments, about=ABOUT)
