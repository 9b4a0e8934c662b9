"""What a job did, for people: the closing table."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """The figures of one run."""

    num_rows: int
    """Rows of the manifest."""
    num_clips: int
    """Distinct clips that they name."""
    num_encoded: int
    """Samples that this run added."""
    num_by_others: int
    """Samples that another job committed while this one encoded them."""
    num_committed_before: int
    """Samples of this manifest that were in the cache already."""
    num_new_texts: int
    """Of these, those that got new texts."""
    num_shared_texts: int
    """Texts that this run stored for samples to share."""
    num_stale: int
    """Samples in the cache whose clips changed, or that the manifest names no more."""
    num_removed: int
    """Of these, those that this run removed."""
    refused: Counter[str]
    """Refused rows, clips and samples of this manifest, by reason."""
    num_bytes: int
    """Of the shards that this run wrote."""
    seconds: float
    """Of encoding, without start-up, probing and planning."""

    def table(self) -> str:
        """Returns the closing table."""
        rows = [
            ("manifest rows", f"{self.num_rows:,}"),
            ("clips", f"{self.num_clips:,}"),
            ("samples encoded", f"{self.num_encoded:,}"),
            *([("  by another job", f"{self.num_by_others:,}")] if self.num_by_others else []),
            ("samples already there", f"{self.num_committed_before:,}"),
            *([("  with new texts", f"{self.num_new_texts:,}")] if self.num_new_texts else []),
            *([("shared texts encoded", f"{self.num_shared_texts:,}")] if self.num_shared_texts else []),
            *([("samples removed", f"{self.num_removed:,}")] if self.num_removed else []),
            ("refused", f"{self.refused.total():,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.refused.most_common()),
            ("bytes written", f"{self.num_bytes:,}"),
            ("samples/s", f"{self.num_encoded / self.seconds:.2f}" if self.num_encoded else "-"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>14}" for name, value in rows)
