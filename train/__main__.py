"""``python -m train``, alone or under torchrun: parse, join the ranks, train, exit."""

import sys

import tyro

from shared.errors import run_entry_point
from train.config import TrainConfig
from train.parallel.ranks import join_ranks


def main() -> int:
    """Returns the exit code of a run with the settings of the command line."""
    with join_ranks() as ranks:

        def run() -> int:
            config = ranks.agree(lambda: tyro.cli(TrainConfig, prog="python -m train", console_outputs=ranks.is_first))
            from train.trainer import train  # imports deepspeed, which takes seconds: not for --help

            return train(config, ranks)

        return run_entry_point(run, debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
