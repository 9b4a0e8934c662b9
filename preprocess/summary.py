"""The figures of a run for machines: ``summary.json`` in its folder."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from preprocess.events import plain, utc_text
from preprocess.report import JobReport
from preprocess.timeline import WorkerSeconds

SUMMARY_FILE = "summary.json"
_LIBRARIES = (
    "latentmill",
    "ray",
    "torch",
    "transformers",
    "diffusers",
    "av",
    "numpy",
    "pyarrow",
    "zstandard",
    "obstore",
)


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a job uses, without loading them."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summary_json(
    report: JobReport, *, config: Mapping[str, Any], start: float, end: float, exit_reason: str, exit_code: int
) -> bytes:
    """Returns ``summary.json``. Credentials in URLs are left out.

    Args:
        report: The figures, also of a run that failed.
        config: Its options, resolved.
        start: In seconds since the epoch.
        end: Likewise.
        exit_reason: Why it ended, one line: ``finished``, ``told to end``, or the error.
        exit_code: What the driver returns.
    """
    tally, workers = report.tally, report.all_workers
    value = {
        "format": "latentmill-run",
        "version": 1,
        "start": utc_text(datetime.fromtimestamp(start, UTC)),
        "end": utc_text(datetime.fromtimestamp(end, UTC)),
        "exit_reason": exit_reason,
        "exit_code": exit_code,
        "config": config,
        "versions": library_versions(),
        "counts": {
            "rows": report.num_rows,
            "clips": report.num_clips,
            "probed": report.num_probed,
            "encoded": tally.num_encoded,
            "by_others": tally.num_by_others,
            "committed_before": report.num_committed_before,
            "new_texts": tally.num_new_texts,
            "shared_texts": tally.num_shared_texts,
            "stale": report.num_stale,
            "removed": report.num_removed,
            "refused": report.num_refused,
            "pending": report.num_pending,
            "retries": tally.num_retries,
            "lost_workers": report.num_lost_workers,
            "tokens": tally.num_tokens,
        },
        "refused": {
            reason: {"count": count, "example": tally.examples.get(reason)}
            for reason, count in tally.refused.most_common()
        },
        "pending": {
            reason: {"count": count, "example": tally.pending_examples.get(reason)}
            for reason, count in tally.pending.most_common()
        },
        "bytes": tally.num_bytes,
        "seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
        "encoder_samples_per_second": report.encoder_rate,
        "tokens_per_second": tally.num_tokens / workers.text if workers and workers.text else None,
        "probes_per_second": _per_second(report.num_probed, report.seconds.get("probing")),
        "gpu_busy": workers.busy if workers else None,
        "data_wait": workers.data_wait if workers else None,
        "first_sample": _first_samples(report),
        "excluded_nodes": [{"node": node.node, "cause": node.cause} for node in report.excluded],
        "workers": {name: _worker(seconds) for name, seconds in report.workers.items()},
    }
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _worker(seconds: WorkerSeconds) -> dict[str, Any]:
    return {**plain(seconds), "gpu_busy": seconds.busy, "data_wait": seconds.data_wait}


def _first_samples(report: JobReport) -> dict[str, Any] | None:
    """Returns how long workers took to their first sample: of all, median and maximum of each part."""
    if not report.first_samples:
        return None
    found: dict[str, Any] = {"workers": len(report.first_samples)}
    for name in ("seconds", "place_seconds", "load_seconds", "encode_seconds"):
        values = [getattr(first, name) for first in report.first_samples]
        found[name] = {"median": round(median(values), 3), "max": round(max(values), 3)}
    return found


def _per_second(number: int, seconds: float | None) -> float | None:
    return number / seconds if number and seconds else None
