"""Probing as Ray tasks of some files each. What was found is stored as it comes, so that a killed job keeps it."""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from preprocess.job import cluster
from preprocess.job.dashboard import Dashboard
from preprocess.job.decoding import DIED, TIMED_OUT, TimedOut, end_of_process
from preprocess.job.urls import resolved_url, written_url
from preprocess.probe import ProbeConfig, ProbeReport
from preprocess.watch import Watch
from shared.clips.deadline import TimedOutError, within
from shared.clips.probes import (
    FILES_A_TASK,
    FileToProbe,
    ProbedClip,
    Probes,
    ProbeTask,
    ProbeTasks,
    probe_file,
    refused_file,
)
from shared.clips.reasons import untaken_note
from shared.errors import InputError
from shared.media.manifest import parse_mapping, read_manifest
from shared.stores.open import open_store

_TASKS_A_CPU = 4
"""Waiting or running."""
_STORE_SECONDS = 30.0
_STORE_CLIPS = 50_000
_GRACE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbingDone:
    """What became of the clips that were to be probed."""

    num_clips: int
    """Looked at."""
    num_left: int
    """Not looked at, since the job was told to end."""
    postponed: list[ProbedClip]
    """Of those looked at, the ones that could not be probed for now."""


def _probe_files(files: Sequence[FileToProbe], timeout_seconds: float) -> Iterator[list[ProbedClip] | TimedOut]:
    """Yields what probing finds of all files, once; if one takes too long, that, and ends the process."""
    found: list[ProbedClip] = []
    for file in files:
        try:
            found += within(timeout_seconds, partial(probe_file, file))
        except TimedOutError:
            yield TimedOut()
            end_of_process()
    yield found


_probe = ray.remote(num_cpus=1, max_retries=0, num_returns="streaming")(_probe_files)


def probe_all(
    probes: Probes,
    tasks: ProbeTasks,
    timeout_seconds: float,
    watch: Watch,
    *,
    resource_seconds: float,
    meanwhile: Callable[[], object] = lambda: None,
) -> ProbingDone:
    """Probes and stores. A crash costs one file. Told to end, it gives what runs 20 seconds.

    Args:
        probes: Where to.
        tasks: What is to be probed.
        timeout_seconds: For one file.
        watch: For the bar.
        resource_seconds: How long to wait for CPUs.
        meanwhile: What else is to be done every second.

    Raises:
        InputError: if nothing is probed for so long that no CPU can be at work.
    """
    queue: deque[ProbeTask] = deque()
    upcoming = iter(tasks)
    running: dict[Any, ProbeTask] = {}
    found: list[ProbedClip] = []
    postponed: list[ProbedClip] = []
    stored = moved = time.monotonic()
    most = _TASKS_A_CPU * cluster.num_cpus()
    with watch.progress.phase("probing", tasks.num_clips, "clip") as phase:
        while True:
            while len(running) < most and not watch.told_to_end:
                task = queue.popleft() if queue else next(upcoming, None)
                if task is None:
                    break
                running[_probe.remote(task.files, timeout_seconds)] = task
            if not running or (watch.told_to_end and time.monotonic() > watch.told_at + _GRACE_SECONDS):
                break
            ready, _ = ray.wait(list(running), timeout=1.0)
            moved = time.monotonic() if ready else moved
            check_moves(time.monotonic() - moved, resource_seconds, timeout_seconds)
            for reference in ready:
                task = running.pop(reference)
                answer = _answer(reference)
                if not isinstance(answer, list) and len(task.files) > 1:
                    queue.extend(ProbeTask(files=(file,)) for file in task.files)
                    continue
                clips = answer if isinstance(answer, list) else _unprobed(task.files[0], answer, timeout_seconds)
                found += clips
                postponed += [clip for clip in clips if clip.transient]
                phase.add(task.num_clips)
            if len(found) >= _STORE_CLIPS or time.monotonic() - stored >= _STORE_SECONDS:
                probes.add(found)
                found, stored = [], time.monotonic()
            watch.progress.tick()
            meanwhile()
    probes.add(found)
    return ProbingDone(num_clips=phase.num_done, num_left=tasks.num_clips - phase.num_done, postponed=postponed)


def check_moves(still_seconds: float, resource_seconds: float, timeout_seconds: float) -> None:
    """Raises :class:`InputError` if no task came to an end for longer than one may take and wait for a CPU."""
    running_seconds = FILES_A_TASK * timeout_seconds if cluster.has_cpus() else 0.0
    if still_seconds > resource_seconds + running_seconds:
        raise InputError(
            f"nothing was probed for {still_seconds:.0f} s: a probing task asks for a CPU, and "
            f"{cluster.what_there_is()}: free some, add nodes, or wait longer by --resource-timeout"
        )


def run_probe(config: ProbeConfig) -> ProbeReport:
    """Probes a manifest's clips into a store.

    Raises:
        InputError: for what the user gave: manifest, columns, store, cluster; and if there is nothing to look at.
    """
    manifest = read_manifest(
        resolved_url(config.manifest), columns=parse_mapping(config.columns), ignore=config.ignore_columns
    )
    manifest.require_usable(config.manifest)
    probes = Probes.open(open_store(written_url("probes", config.probes)))
    with cluster.joined_cluster(config.address):
        watch = Watch(Dashboard().note)
        watch.listen()
        if note := untaken_note(config.retry_refused, probes.refused(manifest) if config.retry_refused else {}):
            print(note, file=sys.stderr)
        tasks = probes.missing(manifest, check_stamps=config.check_sources, retry_refused=config.retry_refused)
        done = probe_all(probes, tasks, config.timeout, watch, resource_seconds=config.resource_timeout)
    reasons = probes.table_for(manifest)["reason"].drop_null().to_pylist()
    return ProbeReport(
        num_rows=manifest.num_rows,
        refused_rows=Counter(row.reason for row in manifest.refused),
        num_clips=len(manifest.clips),
        num_probed=done.num_clips - len(done.postponed),
        seconds=watch.progress.seconds["probing"],
        unusable=Counter(reasons),
        pending=Counter({"told to end": done.num_left} if done.num_left else {})
        + Counter(clip.reason or "" for clip in done.postponed),
    )


def _answer(reference: Any) -> list[ProbedClip] | TimedOut | Exception:
    """Returns what a task says, or why it says nothing."""
    try:
        answer: list[ProbedClip] | TimedOut = ray.get(next(reference))
    except cluster.TASK_FAILURES as error:
        return error
    return answer


def _unprobed(file: FileToProbe, error: Exception | TimedOut, timeout_seconds: float) -> list[ProbedClip]:
    """Returns why the clips of a file are not probed whose task died, tried by itself."""
    if isinstance(error, TimedOut):
        return refused_file(file, TIMED_OUT, f"not probed within {timeout_seconds:g} s, tried by itself")
    if isinstance(error, cluster.LOSSES):
        return refused_file(file, "decoder_lost", f"its worker was lost: {type(error).__name__}", transient=True)
    if isinstance(error, RayTaskError):
        return refused_file(file, "not_decodable", f"{type(error.cause).__name__}: {error.cause}")
    return refused_file(file, DIED, f"its worker died: {type(error).__name__}")
