"""Decoding as Ray tasks of several clips each, on any node's CPUs or on the decoders of its GPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from preprocess.decode_ahead import Pending, TaskDiedError
from preprocess.job.cluster import LOSSES, TASK_FAILURES
from shared.clips.decode import Decoder, Frames, decode_samples, postpone, refuse
from shared.clips.plan import SampleTask
from shared.errors import InputError
from shared.spec import Bucket

_NVDEC_GPUS = 0.01
"""Of a GPU, for a task that uses its decoders."""

_decode = ray.remote(num_cpus=1, max_retries=0)(decode_samples)


class _Task:
    """A decoding task on Ray; its frames come one after another."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def next(self) -> Frames:
        try:
            return ray.get(next(self._frames))
        except LOSSES as error:
            raise TaskDiedError(False, f"its decoding worker was lost: {type(error).__name__}") from None
        except RayTaskError as error:
            if isinstance(error.cause, InputError):  # such as decoders that this GPU has not: no fault of the clip
                raise error.cause from None
            raise TaskDiedError(True, f"{type(error.cause).__name__}: {error.cause}") from None
        except TASK_FAILURES as error:
            raise TaskDiedError(True, f"its decoding worker died: {type(error).__name__}") from None


def submitter(decoder: Decoder, timeout_seconds: float) -> Callable[[Sequence[SampleTask], Bucket], Pending]:
    """Returns what starts a decoding task."""
    task = _decode.options(num_returns="streaming", num_gpus=_NVDEC_GPUS if decoder == "nvdec" else 0)

    def submit(samples: Sequence[SampleTask], bucket: Bucket) -> Pending:
        return _Task(task.remote(samples, bucket, decoder=decoder, timeout_seconds=timeout_seconds))

    return submit


def explainer(timeout_seconds: float) -> Callable[[SampleTask, Bucket, TaskDiedError], Frames]:
    """Returns what says why a sample has no frames whose decoding task died, although it was tried by itself."""

    def explain(sample: SampleTask, bucket: Bucket, error: TaskDiedError) -> Frames:
        if not error.at_fault:
            return postpone(sample, "decoder_lost", error.detail)
        detail = f"{error.detail} (a crash, or longer than {timeout_seconds:g} s: --decode-timeout)"
        return refuse(sample, bucket, "decoder_crashed", detail)

    return explain
