"""``python -m preprocess.probe``: the true sizes and lengths of a manifest's clips, on Ray, once for several caches.

A job probes what is not probed by itself; this command is for looking at a data set first, or for sharing probes.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from shared.clips.reasons import check_retried
from shared.errors import InputError, run_entry_point
from shared.media.manifest import parse_mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """Find out the true size, length, rate and version of clips, whatever their manifest says.

    Run again, it probes only what is missing. Exit code 3: some clips could not be looked at now.
    """

    manifest: str
    """As for python -m preprocess."""
    probes: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Where to keep what is found: a folder that every node sees, or an object-store prefix. Give it to preprocess by
    --probes, or use CACHE/probes, where it looks by itself."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="THEIRS=OURS ...")] = ()
    """As for python -m preprocess."""
    ignore_columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Columns of the manifest to leave out."""
    check_sources: bool = False
    """Look again whether probed files have changed."""
    retry_refused: Annotated[tuple[str, ...], tyro.conf.arg(metavar="REASON ...")] = ()
    """Probe clips again that could not be used for these reasons."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """A file that takes longer is refused."""
    resource_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    """How long to wait for CPUs that the cluster does not have free."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Ray cluster to join."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        parse_mapping(self.columns)
        check_retried(self.retry_refused)
        for name in ("timeout", "resource_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """What a run found."""

    num_rows: int
    """Of the manifest."""
    refused_rows: Counter[str]
    """Rows of the manifest that name no clip to encode, by reason."""
    num_clips: int
    """Of the manifest."""
    num_probed: int
    """By this run."""
    seconds: float
    """Of probing."""
    unusable: Counter[str]
    """Clips of the manifest that cannot be used, by reason."""
    pending: Counter[str]
    """Clips that could not be looked at now, by reason."""

    def table(self) -> str:
        """Returns the closing table."""
        rows = [
            ("manifest rows", f"{self.num_rows:,}"),
            ("rows refused", f"{self.refused_rows.total():,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.refused_rows.most_common()),
            ("clips", f"{self.num_clips:,}"),
            ("probed now", f"{self.num_probed:,}"),
            ("probes/s", f"{self.num_probed / self.seconds:,.1f}" if self.num_probed else "-"),
            ("cannot be used", f"{self.unusable.total():,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.unusable.most_common()),
            ("could not be looked at", f"{self.pending.total():,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.pending.most_common()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in rows)


def main() -> int:
    """Returns 0, or 3 if some clips could not be looked at now."""
    config = tyro.cli(ProbeConfig, prog="python -m preprocess.probe")
    from preprocess.job.probing import run_probe  # loads Ray: not for --help and mistyped options

    report = run_probe(config)
    print(report.table())
    return 3 if report.pending else 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
