"""What happens in a job, as the driver writes it down: a dataclass an event, a line of JSON each. Pure.

No credentials: what stands before the host or behind the question mark of a URL is left out wherever text is written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.cache.ledger import Refusal
from shared.redaction import without_credentials

_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The job began."""

    config: Mapping[str, Any]
    """Its options, resolved."""
    versions: Mapping[str, str]
    """Of the libraries that the driver runs with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What is to be done is known."""

    num_shards: int
    num_samples: int
    num_texts: int
    """That are encoded by themselves."""
    num_committed_before: int
    seconds: float
    """Of planning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """A shard is in the cache."""

    key: str
    """Its identity, by which retries name it too."""
    shard: str
    num_members: int
    num_bytes: int
    worker: str
    is_created: bool
    """False: another job committed it first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """Clips or rows of the manifest that went into the ledger."""

    reasons: Mapping[str, int]
    """How many, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retried:
    """A shard will be handed out again."""

    key: str
    cause: str
    delay_seconds: float
    """0 if at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Halved:
    """A shard killed three workers, or one while on trial: its samples will be tried as two shards."""

    key: str
    cause: str
    halves: tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convicted:
    """A clip kills workers; the driver writes the refusal into the ledger."""

    key: str
    refusal: Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftPending:
    """A shard is not tried again in this pass."""

    key: str
    num_members: int
    cause: str
    example: str
    """One of them, and what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """Nothing more is handed out: too much failed in a row."""

    message: str
    """For the user, one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draining:
    """The driver was told to end: what runs may finish."""

    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStarted:
    """A worker has loaded its encoders."""

    worker: str
    node: str
    load_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstSample:
    """A worker has encoded its first sample, or text."""

    worker: str
    node: str
    place_seconds: float
    """From asking for it to its process: longer where it waited for a GPU."""
    load_seconds: float
    """From its process to its encoders, weights hashed, output looked at."""
    encode_seconds: float
    """From then to the first sample: clips decoded, kernels compiled."""

    @property
    def seconds(self) -> float:
        """From asking for the worker to its first sample."""
        return self.place_seconds + self.load_seconds + self.encode_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeExcluded:
    """A node gets no more work, while others get on."""

    node: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLost:
    """A worker is gone."""

    worker: str
    node: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Where the job is, every ten seconds."""

    phase: str
    """As the progress bar has it."""
    num_done: int
    num_total: int
    unit: str
    per_second: float
    """Units over the last minute."""
    gpu_busy: float | None
    """Part of the workers' time over the last minute in which the encoders' kernels ran; None if none was at work."""
    data_wait: float | None
    """Likewise, in which a worker stood still for want of decoded frames."""
    eta_seconds: float | None
    num_workers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The last event."""

    exit_reason: str
    exit_code: int


Consequence = Retried | Halved | Convicted | LeftPending | Stopped
"""Of a shard's loss, as ``preprocess.schedule`` decides it."""
Event = (
    Started
    | Planned
    | Committed
    | Refused
    | Consequence
    | Draining
    | WorkerStarted
    | FirstSample
    | WorkerLost
    | NodeExcluded
    | Heartbeat
    | Ended
)


def event_json(event: Event, when: datetime) -> dict[str, Any]:
    """Returns what an event's line holds: ``time``, ``event``, and its fields, without credentials."""
    name = _WORD.sub("_", type(event).__name__).lower()
    return {"time": utc_text(when), "event": name, **plain(event)}


def utc_text(when: datetime) -> str:
    """Returns a time as ``2025-01-31T12:00:00.123Z``."""
    return when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """Returns what JSON can hold of a value, without credentials.

    Args:
        value: Of dataclasses, mappings, sequences, paths, texts, numbers, truth values and None.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return without_credentials(str(value))
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {without_credentials(str(key)): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in (sorted(value) if isinstance(value, set | frozenset) else value)]
    raise TypeError(f"{type(value).__name__} has no place in an event")
