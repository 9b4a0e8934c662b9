"""Whether a worker gets on: by the steps of its work, not by how long a shard takes. Pure: no Ray, no clock.

A worker that hangs in CUDA, in a lock or on a dead disk raises nothing. It answers no more, or answers and makes no
step. What waits for decoded frames is not stuck by itself: the limit for that is the decoders' own and the time that
the cluster is given to find CPUs for them.
"""

from dataclasses import dataclass
from typing import Literal

from preprocess.messages import Activity, Pulse

LOAD_SECONDS = 1800.0
"""For loading the encoders, downloads included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long what may take."""

    worker_seconds: float
    """Without an answer, or without a step while it encodes."""
    frame_seconds: float
    """Without a step while it waits for frames: longer than any clip may take to be decoded, queues included."""
    load_seconds: float = LOAD_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Stuck:
    """A worker that does not get on."""

    kind: Literal["worker", "frames"]
    """Whether it is the worker's own fault, or frames do not come."""
    detail: str


class Liveness:
    """What is known of one worker that has a process.

    Args:
        limits: How long what may take.
        now: Seconds, by the clock of all calls.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._answered = self._stepped = now
        self._pulse: Pulse | None = None

    def note(self, pulse: Pulse, now: float) -> None:
        """Takes note of an answer."""
        self._answered = now
        before = self._pulse
        moved = before is None or (pulse.activity, pulse.num_steps) != (before.activity, before.num_steps)
        if moved or pulse.activity == "idle":
            self._stepped = now
        self._pulse = pulse

    def stuck(self, now: float) -> Stuck | None:
        """Returns why the worker is to be ended, or None."""
        silent, still = now - self._answered, now - self._stepped
        if silent > self._limits.worker_seconds:
            return Stuck(kind="worker", detail=f"it is stuck: no answer for {silent:.0f} s (--worker-timeout)")
        activity: Activity = self._pulse.activity if self._pulse else "loading"
        if activity == "encoding" and still > self._limits.worker_seconds:
            return Stuck(kind="worker", detail=f"it is stuck: no step of encoding for {still:.0f} s (--worker-timeout)")
        if activity == "loading" and still > self._limits.load_seconds:
            return Stuck(kind="worker", detail=f"it is stuck: the encoders were not loaded within {still:.0f} s")
        if activity == "waiting" and still > self._limits.frame_seconds:
            return Stuck(kind="frames", detail=f"no decoded frames came for {still:.0f} s")
        return None
