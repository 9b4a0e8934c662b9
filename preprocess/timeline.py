"""When each worker's encoders were at work, in a fixed number of bins however long the job: ``timeline.json``.

``python -m preprocess.timeline CACHE`` draws it. Free of torch, for the driver.
"""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import tyro

from preprocess.events import utc_text
from preprocess.run_folder import newest_run, read_of_run
from shared.errors import InputError, run_entry_point
from shared.stores.open import open_store
from shared.wording import counted

Kind = Literal["text", "vae", "wait", "commit", "launch", "ahead"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SUMMED = KINDS[:4]
TIMELINE_FILE = "timeline.json"
NUM_BINS = 600
_FORMAT = "latentmill-timeline"
_WAIT = KINDS.index("wait")
_OF_RATES = (KINDS.index("text"), KINDS.index("vae"), _WAIT)
_FIRST_BIN_SECONDS = 1.0
_RECENT_SECONDS = 60
_LEAST_ALIVE = 0.05
"""Part of a bin: percents of less would be noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A stretch of time in which a worker did one thing."""

    kind: Kind
    """text and vae: the encoders' kernels ran; commit: a shard was finished and committed. Of the thread whose turn it
    is: wait: for decoded frames; launch: it launched kernels on a GPU; ahead: that had kernels enough."""
    start: float
    """Seconds since the epoch."""
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSeconds:
    """What a worker, or several, did."""

    alive: float
    """From its start to its end."""
    text: float
    vae: float
    wait: float
    """For decoded frames, whether kernels ran meanwhile or not."""
    commit: float

    @property
    def busy(self) -> float | None:
        """Part of the time in which kernels of the encoders ran; None if it was never alive."""
        return min((self.text + self.vae) / self.alive, 1.0) if self.alive > 0 else None

    @property
    def data_wait(self) -> float | None:
        """Part of the time in which it waited for frames and no kernel ran, at most; None if it was never alive."""
        return max(min(self.wait, self.alive - self.text - self.vae), 0.0) / self.alive if self.alive > 0 else None

    def __add__(self, other: "WorkerSeconds") -> "WorkerSeconds":
        return WorkerSeconds(
            alive=self.alive + other.alive,
            text=self.text + other.text,
            vae=self.vae + other.vae,
            wait=self.wait + other.wait,
            commit=self.commit + other.commit,
        )


NOTHING = WorkerSeconds(alive=0.0, text=0.0, vae=0.0, wait=0.0, commit=0.0)


@dataclass(kw_only=True, slots=True)
class _Life:
    """Of a worker; ``end`` is None while it lasts."""

    start: float
    end: float | None = None

    def seconds(self, since: float, now: float) -> float:
        """Returns how long it was alive between two times."""
        return max(min(now, math.inf if self.end is None else self.end) - max(self.start, since), 0.0)


class _Row:
    """One worker: seconds of each kind by bin, and when it was alive."""

    def __init__(self) -> None:
        self.bins = np.zeros((len(KINDS), NUM_BINS), np.float32)
        self.totals = np.zeros(len(KINDS))
        self.lives: list[_Life] = []


class Timeline:
    """The workers' intervals, added up in bins that grow with the job. 15 kB a worker.

    Args:
        start: Of the job, in seconds since the epoch; what lay before does not count.
    """

    def __init__(self, start: float) -> None:
        self._start, self._bin_seconds = start, _FIRST_BIN_SECONDS
        self._rows: dict[str, _Row] = {}
        self._recent: dict[int, tuple[float, float]] = {}
        """By second: seconds in which workers were busy, and in which they waited."""

    def started(self, worker: str, when: float) -> None:
        """Takes note that a worker has loaded its encoders. What comes in place of a lost one may have its name."""
        row = self._rows.setdefault(worker, _Row())
        self.ended(worker, when)
        row.lives.append(_Life(start=max(when, self._start)))

    def ended(self, worker: str, when: float) -> None:
        """Takes note that a worker is gone; it may be said twice, and of one that never started."""
        lives = self._rows[worker].lives if worker in self._rows else []
        if lives and lives[-1].end is None:
            lives[-1].end = max(when, lives[-1].start)

    def add(self, worker: str, intervals: Iterable[Interval]) -> None:
        """Adds what a worker did, in any order. It was started before."""
        row = self._rows[worker]
        for interval in intervals:
            start = max(interval.start, self._start)
            if interval.end <= start:
                continue
            kind = KINDS.index(interval.kind)
            row.totals[kind] += interval.end - start
            while interval.end - self._start >= NUM_BINS * self._bin_seconds:
                self._coarsen()
            _spread(row.bins[kind], start - self._start, interval.end - self._start, self._bin_seconds)
            if kind in _OF_RATES:
                self._note_recent(start, interval.end, is_wait=kind == _WAIT)

    @property
    def num_alive(self) -> int:
        """Workers that are alive."""
        return sum(bool(row.lives) and row.lives[-1].end is None for row in self._rows.values())

    def recent(self, now: float) -> tuple[float | None, float | None]:
        """Returns the parts of the last minute in which living workers were busy, and waited for frames.

        Both are None if none was alive. What workers have not reported yet is missing.
        """
        since = now - _RECENT_SECONDS
        self._recent = {second: sums for second, sums in self._recent.items() if second >= since - 1}
        alive = sum(life.seconds(since, now) for row in self._rows.values() for life in row.lives)
        if alive <= 0:
            return None, None
        busy = min(sum(busy for busy, _ in self._recent.values()), alive)
        return busy / alive, min(sum(wait for _, wait in self._recent.values()), alive - busy) / alive

    def totals(self, now: float) -> dict[str, WorkerSeconds]:
        """Returns what each worker did up to now, by its name."""
        return {
            worker: WorkerSeconds(
                alive=sum(life.seconds(self._start, now) for life in row.lives),
                **{kind: float(row.totals[KINDS.index(kind)]) for kind in _SUMMED},
            )
            for worker, row in self._rows.items()
        }

    def to_json(self, now: float) -> bytes:
        """Returns ``timeline.json``: for each worker, when it was alive, and the percent of each bin by kind."""
        num_bins = min(max(math.ceil((now - self._start) / self._bin_seconds), 1), NUM_BINS)
        workers = [
            {
                "name": worker,
                "alive": [
                    [round(life.start - self._start, 1), round((life.end or now) - self._start, 1)]
                    for life in row.lives
                ],
                "percent": {
                    kind: np.rint(row.bins[number, :num_bins] / self._bin_seconds * 100).astype(int).tolist()
                    for number, kind in enumerate(KINDS)
                },
            }
            for worker, row in sorted(self._rows.items())
        ]
        value = {
            "format": _FORMAT,
            "version": 1,
            "start": utc_text(datetime.fromtimestamp(self._start, UTC)),
            "seconds": round(now - self._start, 1),
            "bin_seconds": self._bin_seconds,
            "workers": workers,
        }
        return json.dumps(value, separators=(",", ":")).encode()

    def _coarsen(self) -> None:
        """Makes every two bins one."""
        for row in self._rows.values():
            pairs = row.bins.reshape(len(KINDS), NUM_BINS // 2, 2).sum(axis=2)
            row.bins = np.concatenate([pairs, np.zeros_like(pairs)], axis=1)
        self._bin_seconds *= 2

    def _note_recent(self, start: float, end: float, *, is_wait: bool) -> None:
        for second in range(int(max(start, end - 2 * _RECENT_SECONDS)), math.ceil(end)):
            part = min(end, second + 1) - max(start, second)
            busy, wait = self._recent.get(second, (0.0, 0.0))
            self._recent[second] = (busy, wait + part) if is_wait else (busy + part, wait)


def _spread(bins: npt.NDArray[np.float32], start: float, end: float, width: float) -> None:
    """Adds the seconds from ``start`` to ``end`` to the bins (N,) that they lie in, each ``width`` seconds long."""
    first, last = int(start / width), min(int(end / width), len(bins) - 1)
    if first == last:
        bins[first] += end - start
        return
    bins[first] += (first + 1) * width - start
    bins[first + 1 : last] += width
    bins[last] += end - last * width


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnWorker:
    """One worker of a timeline as it was stored."""

    name: str
    alive: npt.NDArray[np.bool_]
    """(N,): by bin, whether it was alive at some time in it."""
    percent: dict[Kind, npt.NDArray[np.float32]]
    """By kind (N,): of the time in each bin in which it was alive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A timeline as it was stored."""

    start: str
    seconds: float
    bin_seconds: float
    workers: tuple[DrawnWorker, ...]

    @property
    def num_bins(self) -> int:
        """Bins of each worker."""
        return len(self.workers[0].alive) if self.workers else 0


def parse(data: bytes) -> Stored:
    """Returns a stored timeline.

    Raises:
        InputError: if it is none.
    """
    try:
        value = json.loads(data)
        if (value["format"], value["version"]) != (_FORMAT, 1):
            raise ValueError(f"format {value['format']} {value['version']}")
        width = float(value["bin_seconds"])
        return Stored(
            start=str(value["start"]),
            seconds=float(value["seconds"]),
            bin_seconds=width,
            workers=tuple(_parse_worker(worker, width) for worker in value["workers"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{TIMELINE_FILE} is not one of version 1 ({error}): expected what a job wrote") from None


def _parse_worker(value: dict[str, Any], width: float) -> DrawnWorker:
    stored = value["percent"]  # a job of an earlier version tells of fewer kinds
    percent = {kind: np.asarray(stored.get(kind, [0] * len(stored["vae"])), np.float32) for kind in KINDS}
    edges = np.arange(len(percent["vae"])) * width
    alive = np.zeros(len(edges))
    for start, end in value["alive"]:
        alive += np.clip(np.minimum(edges + width, end) - np.maximum(edges, start), 0, None) / width
    share = np.maximum(alive, _LEAST_ALIVE)
    return DrawnWorker(
        name=str(value["name"]),
        alive=alive > 0,
        percent={kind: np.minimum(values / share, 100).astype(np.float32) for kind, values in percent.items()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineOptions:
    """Draw when the workers of a job were busy."""

    cache: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
    """The cache: a folder, or s3://bucket/prefix, gs:// or az://."""
    run: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The run, a name below runs/. Without it: the newest that has a timeline."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE.png")] = Path("timeline.png")
    """Where to."""
    debug: bool = False
    """Show tracebacks of user errors."""


def main() -> int:
    """Draws the timeline of a run; returns 0."""
    options = tyro.cli(TimelineOptions, prog="python -m preprocess.timeline")
    if options.output.suffix != ".png":
        raise InputError(f"--output {options.output}: expected a name that ends in .png")
    from preprocess.timeline_plot import draw  # loads matplotlib: not for --help

    store = open_store(options.cache)
    run = options.run or newest_run(store, TIMELINE_FILE)
    stored = parse(read_of_run(store, run, TIMELINE_FILE))
    try:
        options.output.write_bytes(draw(stored))
    except OSError as error:
        raise InputError(
            f"--output {options.output}: {error.strerror}: expected a file in a folder that exists"
        ) from None
    print(f"{run}: {counted(len(stored.workers), 'worker')}, drawn to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
