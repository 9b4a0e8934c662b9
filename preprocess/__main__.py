"""``python -m preprocess``: parse, run, exit code."""

import sys

import tyro

from preprocess.config import PreprocessConfig
from shared.errors import run_entry_point
from shared.wording import counted


def main() -> int:
    """Returns 0 if all is done, 1 if too much was refused, 3 if work is left for a later run."""
    config = tyro.cli(PreprocessConfig, prog="python -m preprocess")
    from preprocess.job.driver import describe_job, run_job  # loads Ray: not for --help and mistyped options

    if config.dry_run:
        print(describe_job(config))
        return 0
    try:
        report = run_job(config)
    except KeyboardInterrupt:
        print("what is committed stays; the same command goes on with the rest", file=sys.stderr)
        raise
    print(report.table())
    if report.num_stale > report.num_removed:
        print(
            f"note: {counted(report.num_stale, 'sample')} in the cache of clips that changed or that the manifest does "
            "not name: --prune removes them",
            file=sys.stderr,
        )
    if report.exceeds_limit:
        print(f"error: more is refused than --max-refused {config.max_refused} allows", file=sys.stderr)
    elif report.num_pending:
        print(f"note: {report.num_pending:,} are pending: the same command goes on with them", file=sys.stderr)
    elif report.exit_code:
        print("error: no sample is in the cache: every clip was refused, see the reasons above", file=sys.stderr)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
