"""``python -m train``, alone or under torchrun: parse, join the ranks, train, exit."""

import json
import sys

from shared.errors import run_entry_point
from train.config import TrainConfig
from train.config.command_line import parse_command_line
from train.ending import end_process
from train.parallel.ranks import Ranks, join_ranks
from train.stop import STOPPED


def dry_run(config: TrainConfig, ranks: Ranks) -> int:
    """Prints what a run would do and take, and returns the exit code."""
    from train.parallel.sequence import require_degree
    from train.planning.dry_run import describe  # imports what --help does without
    from train.planning.fitting import device_memory, fit_checkpointing
    from train.setup import plan_run

    world_size, degree = config.plan_ranks or ranks.world_size, config.parallel.sequence_parallel

    def planned() -> str:
        require_degree(degree, world_size)
        run = plan_run(config, data_rank=0, num_data_ranks=world_size // degree, device_type="cuda")
        device_bytes = device_memory(config.parallel.device_memory_gib, ranks.device)
        return describe(fit_checkpointing(run, world_size, device_bytes), world_size)

    text = ranks.agree(lambda: planned() if ranks.is_first else "")
    if ranks.is_first:
        print(text)
    return 0


def main() -> int:
    """Returns the exit code of a run with the settings of the command line."""
    debug = "--debug" in sys.argv
    return run_entry_point(lambda: _with_ranks(debug), debug=debug)


def _with_ranks(debug: bool) -> int:
    with join_ranks() as ranks:

        def run() -> int:
            config = ranks.agree(lambda: parse_command_line(sys.argv[1:], console_outputs=ranks.is_first))
            if config.print_config:
                if ranks.is_first:
                    print(json.dumps(config.to_json(), indent=2))
                return 0
            from train.first_checks import check_first  # with what follows, imports what --help does without

            ranks.agree(lambda: check_first(config) if ranks.is_first else None)
            if config.dry_run:
                return dry_run(config, ranks)
            from train.trainer import train  # imports deepspeed, which takes seconds: not for --help

            return train(config, ranks)

        code = run_entry_point(run, debug=debug)  # within: the other ranks leave after the first has said what is wrong
        if code not in (0, STOPPED):
            ranks.fail_alone()
        return code


if __name__ == "__main__":
    end_process(main)
