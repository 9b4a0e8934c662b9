"""What the driver counts for the closing report."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from preprocess.schedule import Task
from preprocess.text_plan import TextTask
from shared.cache.dataset import CommittedShard
from shared.cache.ledger import Refusal
from shared.clips.plan import ShardTask


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of one run."""

    num_encoded: int = 0
    """Samples that this run added."""
    num_by_others: int = 0
    """Samples that another job committed while this one encoded them."""
    num_new_texts: int = 0
    """Committed samples that got new texts."""
    num_shared_texts: int = 0
    """Texts that were stored for samples to share."""
    num_bytes: int = 0
    """Of the shards that this run wrote."""
    num_retries: int = 0
    """Shards that were handed out again."""
    num_tokens: int = 0
    """Of texts, encoded; padding not counted."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows, clips and samples of this manifest, by reason."""
    examples: dict[str, Refusal] = field(default_factory=dict)
    """The first refusal of each reason."""
    pending: Counter[str] = field(default_factory=Counter)
    """Samples that are left for a later run, by reason."""
    pending_examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason that a clip or a shard has: which, and what was found."""

    def commit(self, task: Task, shard: CommittedShard) -> None:
        """Counts a committed shard."""
        if isinstance(task, TextTask):
            self.num_new_texts += shard.num_samples
        elif not isinstance(task, ShardTask):
            self.num_shared_texts += shard.num_samples
        elif shard.created:
            self.num_encoded += shard.num_samples
        else:
            self.num_by_others += shard.num_samples
        if shard.created:
            self.num_bytes += shard.num_bytes

    def leave(self, reason: str, number: int = 1, example: str | None = None) -> None:
        """Counts what is left for a later run; an example says which clip, and what was found."""
        self.pending[reason] += number
        if example is not None:
            self.pending_examples.setdefault(reason, example)

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        """Counts refusals."""
        for refusal in refusals:
            self.refused[refusal.reason] += 1
            self.examples.setdefault(refusal.reason, refusal)
