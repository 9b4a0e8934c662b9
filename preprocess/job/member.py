"""One worker of a job, as the driver knows it: an actor that is placed, loads, looks at the output, and encodes."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from preprocess.events import FirstSample
from preprocess.job.worker import LEAST_AT_HAND, MOST_AT_HAND
from preprocess.liveness import Limits, Liveness, Stuck
from preprocess.messages import Loaded, Placed, Role

_PULSE_SECONDS = 10.0
_PULSES_A_LIMIT = 5
"""At least so often within the time after which a worker is stuck."""


@dataclass(eq=False, kw_only=True, slots=True)
class Member:
    """One worker."""

    name: str
    actor: Any
    role: Role
    avoided: frozenset[str]
    """Nodes on which it is not placed."""
    waiting: Any
    """The answer to come, of the stage at which it is; None once it is ready."""
    stage: Literal["placing", "loading", "checking", "ready"] = "placing"
    asked_at: float = field(default_factory=time.monotonic)
    placed_at: float = 0.0
    ready_at: float = 0.0
    placed: Placed | None = None
    loaded: Loaded | None = None
    running: dict[str, int] = field(default_factory=dict)
    """Shards that it was given, in that order, and the bytes of their frames."""
    has_encoded: bool = False
    liveness: Liveness | None = None
    """From when it is placed."""
    _pulse: Any = None
    """The answer to come."""
    _next_pulse: float = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it can be given work."""
        return self.stage == "ready"

    @property
    def node(self) -> str:
        """Its node's address, once it is placed."""
        return self.placed.node if self.placed else ""

    @property
    def node_id(self) -> str:
        """Ray's name of its node, once it is placed."""
        return self.placed.node_id if self.placed else ""

    def has_room(self, decode_bytes: int) -> bool:
        """Returns whether it can take a shard, if so many bytes of frames are decoded ahead."""
        if len(self.running) < LEAST_AT_HAND:
            return True
        return len(self.running) < MOST_AT_HAND and sum(self.running.values()) < decode_bytes

    def is_placed(self, placed: Placed, limits: Limits) -> None:
        """Takes note of where it runs."""
        self.placed, self.placed_at = placed, time.monotonic()
        self.liveness = Liveness(limits, self.placed_at)

    def first_sample(self) -> FirstSample | None:
        """Takes note that it has encoded something; returns how long the first took, if this is it."""
        if self.has_encoded:
            return None
        self.has_encoded = True
        return FirstSample(
            worker=self.name,
            node=self.node,
            place_seconds=self.placed_at - self.asked_at,
            load_seconds=self.ready_at - self.placed_at,
            encode_seconds=time.monotonic() - self.ready_at,
        )

    def feel_pulse(self, limits: Limits, now: float) -> Stuck | None:
        """Asks it from time to time whether it gets on, and returns why it does not."""
        if self.liveness is None:
            return None
        if self._pulse is not None:
            ready, _ = ray.wait([self._pulse], timeout=0)
            if ready:
                self._pulse = None
                try:
                    self.liveness.note(ray.get(ready[0]), now)
                except RayError:  # it is dead, which its work says too
                    return None
        elif now >= self._next_pulse:
            self._next_pulse = now + min(_PULSE_SECONDS, limits.worker_seconds / _PULSES_A_LIMIT)
            self._pulse = self.actor.pulse.remote()
        return self.liveness.stuck(now)
