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
    num_committed_before: int
    """Samples of this manifest that were in the cache already."""
    num_other_captions: int
    """Of these, those whose captions in the manifest have changed; the cache keeps those that it was made with."""
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
            ("samples already there", f"{self.num_committed_before:,}"),
            *([("  with other captions", f"{self.num_other_captions:,}")] if self.num_other_captions else []),
            ("refused", f"{self.refused.total():,}"),
            *((f"  {reason}", f"{count:,}") for reason, count in self.refused.most_common()),
            ("bytes written", f"{self.num_bytes:,}"),
            ("samples/s", f"{self.num_encoded / self.seconds:.2f}" if self.num_encoded else "-"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>14}" for name, value in rows)
