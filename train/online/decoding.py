"""The frames of samples, decoded ahead of the trainer in processes of their own."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from shared.cache.ledger import Refusal
from shared.clips.decode import OUTDATED, Frames, Postponed, decode_sample, postpone
from shared.clips.plan import SampleTask
from shared.errors import InputError
from shared.redaction import without_credentials
from shared.spec import Bucket
from train.online.pool import ProcessPool, TaskDiedError

_ATTEMPTS = 4
_PAUSE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A sample that is being decoded."""

    task: SampleTask
    bucket: Bucket
    future: "Future[Any]"


class ClipDecoder:
    """Decodes samples in a pool of processes.

    Args:
        pool: Of processes that may crash.
        timeout_seconds: Of the pool, for what is said of a sample.
        pause: Waits before a sample is tried again that could not be had for a reason that may pass.
    """

    def __init__(
        self, pool: ProcessPool, *, timeout_seconds: float, pause: Callable[[float], Any] = time.sleep
    ) -> None:
        self._pool, self._timeout_seconds, self._pause = pool, timeout_seconds, pause

    def start(self, task: SampleTask, bucket: Bucket) -> Decoding:
        """Has a sample decoded."""
        return Decoding(task=task, bucket=bucket, future=self._pool.submit(partial(_decode, bucket=bucket), task))

    def finish(self, decoding: Decoding) -> np.ndarray | Refusal:
        """Returns the frames of a sample (T, height, width, 3), uint8, or why it has none.

        Raises:
            InputError: if it could not be had for a reason that may pass, and did not while it was tried again.
        """
        frames = self._result(decoding)
        for attempt in range(1, _ATTEMPTS):
            if not isinstance(frames, Postponed) or frames.reason == OUTDATED:
                break
            self._pause(_PAUSE_SECONDS * attempt)
            frames = self._result(self.start(decoding.task, decoding.bucket))
        if not isinstance(frames, Postponed):
            return frames
        if frames.reason == OUTDATED:
            return _refusal(decoding, frames.reason, frames.detail)
        raise InputError(
            f"{frames.source}: {frames.reason}: {frames.detail}: tried {_ATTEMPTS} times: see that its place can be "
            "reached"
        )

    def _result(self, decoding: Decoding) -> Frames:
        bucket = decoding.bucket
        try:
            answer = decoding.future.result()
        except TaskDiedError as error:
            detail = f"{error} (a crash, or longer than {self._timeout_seconds:g} s: --decode-timeout)"
            return _refusal(decoding, "decoder_crashed", detail)
        match answer:
            case np.ndarray() if answer.shape == (bucket.num_frames, bucket.height, bucket.width, 3):
                return answer
            case {"postponed": bool(postponed), "reason": str(reason), "detail": str(detail)}:
                if postponed:
                    return postpone(decoding.task, reason, detail)
                return _refusal(decoding, reason, detail)  # what a user can mend is here like any other
        return _refusal(decoding, "decoder_crashed", f"its process gave no frames of {bucket}, and no reason")


def _decode(task: SampleTask, bucket: Bucket) -> np.ndarray | dict[str, Any]:
    frames = decode_sample(task, bucket)
    if isinstance(frames, np.ndarray):
        return frames
    return {"postponed": isinstance(frames, Postponed), "reason": frames.reason, "detail": frames.detail}


def _refusal(decoding: Decoding, reason: str, detail: str) -> Refusal:
    task = decoding.task
    return Refusal(
        source=task.source,
        source_version=task.source_version,
        bucket=str(decoding.bucket),
        sample=task.sample,
        reason=reason,
        detail=without_credentials(detail),
    )
