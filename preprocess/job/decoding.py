"""Decoding as Ray tasks of several clips each, on any node's CPUs or on the decoders of its GPUs."""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from preprocess.decode_ahead import Pending, TaskDiedError
from preprocess.job import cluster
from preprocess.job.cluster import LOSSES, TASK_FAILURES
from shared.clips.deadline import TimedOutError, within
from shared.clips.decode import Decoder, Frames, decode_sample, postpone, refuse
from shared.clips.plan import SampleTask
from shared.errors import InputError
from shared.media.video import Device
from shared.spec import Bucket

NVDEC_SHARE = 0.1
"""Of each GPU, for tasks that use its decoders: what its workers leave to them."""
_NVDEC_TASKS = 16
"""On a GPU at once, if they decode everything: as many as there are cores for one GPU on most machines."""
_NVDEC_TASKS_BESIDE = 4
"""On a GPU at once, beside tasks that decode on CPUs."""
_CPUS_BESIDE = 0.5
"""For each of those: it waits for the GPU half of the time."""

_NICENESS = 10
"""Of threads that decode: where they fill all cores, the thread that launches a GPU's kernels goes first."""

_FAREWELL_SECONDS = 3.0
DIED, TIMED_OUT = "decoder_crashed", "decode_timeout"
"""Reasons of clips that end their decoders, or take too long."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """In place of an answer: its process ends."""


def end_of_process() -> None:
    """Ends this process, in which a call hangs, once what it has said is on its way."""
    time.sleep(_FAREWELL_SECONDS)
    os._exit(1)


def _decode_samples(
    samples: Sequence[SampleTask], bucket: Bucket, *, device: Device, timeout_seconds: float
) -> Iterator[Frames | TimedOut]:
    """Yields the frames of each sample; one that takes too long is the last, and ends the process."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread; those that it starts have it too
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, _NICENESS))
    for sample in samples:
        try:
            frames = within(timeout_seconds, partial(decode_sample, sample, bucket, device=device))
        except TimedOutError:
            yield TimedOut()
            end_of_process()
        else:
            yield frames
            del frames


_decode = ray.remote(num_cpus=1, max_retries=0)(_decode_samples)


class _Task:
    """A decoding task on Ray; its frames come one after another."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def next(self) -> Frames:
        try:
            frames: Frames | TimedOut = ray.get(next(self._frames))
        except LOSSES as error:
            raise TaskDiedError(False, f"its decoding worker was lost: {type(error).__name__}") from None
        except RayTaskError as error:
            if isinstance(error.cause, InputError):  # such as decoders that this GPU has not: no fault of the clip
                raise error.cause from None
            raise TaskDiedError(True, f"{type(error.cause).__name__}: {error.cause}") from None
        except TASK_FAILURES as error:
            raise TaskDiedError(True, f"its decoding worker died: {type(error).__name__}") from None
        if isinstance(frames, TimedOut):
            raise TaskDiedError(True, "decoding took too long", timed_out=True)
        return frames


class Submitter:
    """Starts decoding tasks of one worker.

    Args:
        decoder: ``auto`` keeps the GPU's decoders busy with a few tasks, and has CPUs do the rest.
        timeout_seconds: For a clip.
        on_gpu: Whether the worker has a GPU; without one, ``auto`` is ``cpu``.
    """

    def __init__(self, decoder: Decoder, timeout_seconds: float, *, on_gpu: bool) -> None:
        self._timeout_seconds = timeout_seconds
        self._most_on_gpu = {"cpu": 0, "nvdec": None, "auto": _NVDEC_TASKS_BESIDE if on_gpu else 0}[decoder]
        # Each GPU's share holds so many tasks and no more; Ray fills one GPU's share first.
        share = NVDEC_SHARE / (self._most_on_gpu or _NVDEC_TASKS)
        self._of_gpu = {
            "num_gpus": int(share * 1000) / 1000,
            "num_cpus": _CPUS_BESIDE if decoder == "auto" else 1,
        }
        self.avoid(())
        self._lock = threading.Lock()
        self._under_way: list[ray.ObjectRef] = []
        """Ends of tasks on GPUs."""

    def avoid(self, nodes: Collection[str]) -> None:
        """Gives some nodes no more tasks."""
        where = {"num_returns": "streaming", "label_selector": cluster.not_on(nodes)}
        self._on_cpu, self._on_gpu = _decode.options(**where), _decode.options(**where, **self._of_gpu)

    def __call__(self, samples: Sequence[SampleTask], bucket: Bucket) -> Pending:
        """Starts a task that decodes samples of one bucket."""
        with self._lock:
            by_gpu = self._most_on_gpu is None or self._num_under_way() < self._most_on_gpu
            task = self._on_gpu if by_gpu else self._on_cpu
            frames = task.remote(
                samples, bucket, device="nvdec" if by_gpu else "cpu", timeout_seconds=self._timeout_seconds
            )
            if by_gpu and self._most_on_gpu is not None:
                self._under_way.append(frames.completed())
        return _Task(frames)

    def _num_under_way(self) -> int:
        if self._under_way:
            _, self._under_way = ray.wait(
                self._under_way, num_returns=len(self._under_way), timeout=0, fetch_local=False
            )
        return len(self._under_way)


def explainer(timeout_seconds: float) -> Callable[[SampleTask, Bucket, TaskDiedError], Frames]:
    """Returns what says why a sample has no frames whose decoding task died, although it was tried by itself."""

    def explain(sample: SampleTask, bucket: Bucket, error: TaskDiedError) -> Frames:
        if not error.at_fault:
            return postpone(sample, "decoder_lost", error.detail)
        if error.timed_out:
            detail = f"not decoded within {timeout_seconds:g} s (--decode-timeout), tried by itself"
            return refuse(sample, bucket, TIMED_OUT, detail)
        return refuse(sample, bucket, DIED, error.detail)

    return explain
