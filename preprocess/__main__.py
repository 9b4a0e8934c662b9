"""``python -m preprocess``: parse, run, exit code."""

import sys

import tyro

from preprocess.config import PreprocessConfig
from shared.errors import run_entry_point


def main() -> int:
    """Returns 0, or 1 if there were clips and none of them is in the cache."""
    config = tyro.cli(PreprocessConfig, prog="python -m preprocess")
    from preprocess.job import run_job  # loads Ray: not for --help and mistyped options

    report = run_job(config)
    print(report.table())
    if report.num_stale > report.num_removed:
        print(
            f"note: {report.num_stale:,} samples in the cache are of clips that changed or that the manifest does not "
            "name: --prune removes them",
            file=sys.stderr,
        )
    if report.num_rows and report.num_encoded + report.num_by_others + report.num_committed_before == 0:
        print("error: no sample is in the cache: every clip was refused, see the reasons above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
