"""A shard in a worker's hands, as the driver knows it."""

from dataclasses import dataclass, field
from typing import Any

from preprocess.decode_ahead import frame_bytes
from preprocess.job.member import Member
from preprocess.schedule import Task
from shared.cache.dataset import CommittedShard
from shared.cache.ledger import Refusal
from shared.clips.decode import Postponed
from shared.clips.plan import ShardTask


@dataclass(eq=False, kw_only=True, slots=True)
class Run:
    """A shard that a worker was given."""

    task: Task
    member: Member
    text: Member | None = None
    """While its captions are being embedded: by whom."""
    embeddings: Any = None
    """To come."""
    has_begun: bool = False
    num_done: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)
    shard: CommittedShard | None = None

    @property
    def key(self) -> str:
        """The shard's identity."""
        return self.task.shard_id

    def pending(self) -> dict[str, str]:
        """Returns the samples that the shard lacks for now, with the reason."""
        return {sample.sample: sample.reason for sample in self.postponed}


def frame_bytes_of(task: Task) -> int:
    """Returns the bytes of all frames that a task takes."""
    return len(task.samples) * frame_bytes(task.bucket) if isinstance(task, ShardTask) else 0
