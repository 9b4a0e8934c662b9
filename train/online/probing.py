"""Probing a manifest's clips before a run, on this machine; a job's ``preprocess.probe`` does it on many."""

import math
import time
from collections import deque
from concurrent.futures import Future
from fractions import Fraction
from typing import Any

from shared.clips.probes import FileToProbe, ProbedClip, Probes, probe_file, refused_file
from shared.media.manifest import Manifest
from shared.media.probe import Probe
from train.online.pool import ProcessPool, TaskDiedError

_STORE_SECONDS = 60.0
_FILES_AHEAD = 8
"""A process."""
_LARGEST = 2**31 - 1


def probe_clips(manifest: Manifest, probes: Probes, *, num_workers: int, timeout_seconds: float) -> list[ProbedClip]:
    """Probes what is not probed and stores it. A crash costs one file.

    Returns the clips that cannot be used for a reason that may pass, such as a missing file: of these nothing is kept.

    Args:
        manifest: Whose clips are wanted.
        probes: Where they are kept.
        num_workers: Processes.
        timeout_seconds: For one file.

    Raises:
        InputError: if probes cannot be read or stored, or a store refuses.
    """
    tasks = probes.missing(manifest)
    if not tasks.num_clips:
        return []
    files = (file for task in tasks for file in task.files)
    running: deque[tuple[FileToProbe, Future[Any]]] = deque()
    found: list[ProbedClip] = []
    postponed: list[ProbedClip] = []
    stored = time.monotonic()
    with ProcessPool(num_workers=num_workers, timeout_seconds=timeout_seconds) as pool:
        while True:
            while len(running) < num_workers * _FILES_AHEAD and (file := next(files, None)) is not None:
                running.append((file, pool.submit(_probe, file)))
            if not running:
                break
            file, future = running.popleft()
            try:
                clips = _clips(file, future.result())
            except TaskDiedError as error:
                clips = refused_file(file, "decoder_crashed", f"{error} (a crash, or longer than --decode-timeout)")
            found += clips
            postponed += [clip for clip in clips if clip.transient]
            if time.monotonic() - stored > _STORE_SECONDS:
                probes.add(found)
                found, stored = [], time.monotonic()
    probes.add(found)
    return postponed


def _probe(file: FileToProbe) -> list[dict[str, Any]]:
    """Returns what probing finds of a file, as JSON values: no more than the file tells, not what is known of it."""
    return [_told(clip) for clip in probe_file(file)]


def _told(clip: ProbedClip) -> dict[str, Any]:
    told: dict[str, Any] = {"stamp": clip.stamp}
    if clip.facts is None:
        return told | {"reason": clip.reason, "detail": clip.detail, "transient": clip.transient}
    return told | {
        "facts": {name: getattr(clip.facts, name) for name in Probe.__slots__ if name != "fps"}
        | {"fps": [clip.facts.fps.numerator, clip.facts.fps.denominator]}
    }


def _clips(file: FileToProbe, told: Any) -> list[ProbedClip]:
    """Returns the clips of a file that :func:`_probe` told of."""
    if told == []:
        return []
    try:
        return [
            ProbedClip(source=file.source, media=file.media, time_range=time_range, **_found(of_one))
            for time_range, of_one in zip(file.ranges, told, strict=True)
        ]
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        return refused_file(file, "decoder_crashed", "its process told of it what cannot be")


def _found(told: Any) -> dict[str, Any]:
    match told:
        case {"stamp": str(stamp), "facts": dict(facts)}:
            return {"stamp": stamp, "facts": _facts(**facts)}
        case {"stamp": str() | None as stamp, "reason": str(reason), "detail": str(detail), "transient": bool(passes)}:
            return {"stamp": stamp, "facts": None, "reason": reason, "detail": detail, "transient": passes}
    raise ValueError


def _facts(*, version: str, fps: list[int], duration: float, is_image: bool, codec: str, **numbers: int) -> Probe:
    counts = [*numbers.values(), *fps]
    if not all(type(count) is int and 0 <= count <= _LARGEST for count in counts):
        raise ValueError
    if not isinstance(duration, float | int) or not math.isfinite(duration) or not isinstance(is_image, bool):
        raise ValueError
    if not isinstance(version, str) or not isinstance(codec, str):
        raise ValueError
    return Probe(
        version=version,
        fps=Fraction(*fps),
        duration=float(duration),
        is_image=is_image,
        codec=codec,
        **numbers,
    )
