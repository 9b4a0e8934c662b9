"""``python -m train``, alone or under torchrun: parse, join the ranks, train, exit."""

import json
import sys

from shared.errors import run_entry_point
from train.config.command_line import parse_command_line
from train.parallel.ranks import join_ranks


def main() -> int:
    """Returns the exit code of a run with the settings of the command line."""
    with join_ranks() as ranks:

        def run() -> int:
            config = ranks.agree(lambda: parse_command_line(sys.argv[1:], console_outputs=ranks.is_first))
            if config.print_config:
                if ranks.is_first:
                    print(json.dumps(config.to_json(), indent=2))
                return 0
            from train.trainer import train  # imports deepspeed, which takes seconds: not for --help

            return train(config, ranks)

        return run_entry_point(run, debug="--debug" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
