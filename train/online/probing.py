"""Probing a manifest's clips before a run, on this machine; a job's ``preprocess.probe`` does it on many."""

import time
from collections import deque
from concurrent.futures import Future

from shared.clips.probes import FileToProbe, ProbedClip, Probes, probe_file, refused_file
from shared.media.manifest import Manifest
from train.online.pool import ProcessPool, TaskDiedError

_STORE_SECONDS = 60.0
_FILES_AHEAD = 8
"""A process."""


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
    running: deque[tuple[FileToProbe, Future[list[ProbedClip]]]] = deque()
    found: list[ProbedClip] = []
    postponed: list[ProbedClip] = []
    stored = time.monotonic()
    with ProcessPool(num_workers=num_workers, timeout_seconds=timeout_seconds) as pool:
        while True:
            while len(running) < num_workers * _FILES_AHEAD and (file := next(files, None)) is not None:
                running.append((file, pool.submit(probe_file, file)))
            if not running:
                break
            file, future = running.popleft()
            try:
                clips = future.result()
            except TaskDiedError as error:
                clips = refused_file(file, "decoder_crashed", f"{error} (a crash, or longer than --decode-timeout)")
            found += clips
            postponed += [clip for clip in clips if clip.transient]
            if time.monotonic() - stored > _STORE_SECONDS:
                probes.add(found)
                found, stored = [], time.monotonic()
    probes.add(found)
    return postponed
