"""What is trained on, in what batches, and how it is read."""

from dataclasses import dataclass
from pathlib import Path

from shared.errors import InputError
from train.config.settings import MayChange, require_at_least, require_positive
from train.rank_batches import OnCorrupt
from train.sample_index import Variants
from train.where import Where, parse_fraction

_BATCH_SIZE = 8
_LOCAL_CACHE_GB = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """What is trained on, in what batches, and how it is read."""

    buckets: tuple[str, ...] = ()
    """Train on these buckets only (FRAMESxHEIGHTxWIDTH); all of the cache's by default."""
    where: str | None = None
    """Train on what fulfils a condition on columns of manifest or index, e.g. 'aesthetic > 5 and fps >= 24'."""
    holdout: str | None = None
    """Keep a part of the sources, e.g. 1%, out of training; all samples of a source are on one side."""
    variants: Variants = "one"
    """Of a clip that was encoded in several windows, or mirrored: each epoch one of them, or all."""
    batch_size: int = _BATCH_SIZE
    """Samples of one step, over all ranks."""
    batch_tokens: int | None = None
    """Most tokens of one step, over all ranks, in place of --batch-size: each bucket gets as many samples as fit."""
    batch_multiple: int = 1
    """With --batch-tokens: samples of a step are a multiple of this; the number of ranks must divide it."""
    num_workers: MayChange[int] = 2
    """Processes a rank that read ahead; 0 reads in the trainer."""
    on_corrupt: MayChange[OnCorrupt] = "stop"
    """At a sample that is missing or damaged: stop, or train on the next good one instead and count it."""
    local_cache: MayChange[Path | None] = None
    """A folder on a disk of each node: for the index, and for what was read from an object store."""
    local_cache_gb: MayChange[float] = _LOCAL_CACHE_GB
    """Most that --local-cache keeps of an object store, in 10^9 bytes."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "batch_multiple")
        require_at_least(self, 0, "num_workers")
        require_positive(self, "batch_tokens", "local_cache_gb")
        if self.batch_tokens is not None and self.batch_size != _BATCH_SIZE:
            raise InputError(f"batch_size={self.batch_size} and batch_tokens={self.batch_tokens}: give one of them")
        if self.batch_tokens is None and self.batch_multiple != 1:
            raise InputError(f"batch_multiple={self.batch_multiple} does nothing without --batch-tokens")
        if self.local_cache is None and self.local_cache_gb != _LOCAL_CACHE_GB:
            raise InputError(f"local_cache_gb={self.local_cache_gb} does nothing without --local-cache")
        if self.where is not None:
            Where(self.where)
        if self.holdout is not None:
            parse_fraction(self.holdout)
