"""What a step takes and what is drawn for it: the same whether the samples are read from a cache or encoded online."""

from dataclasses import dataclass
from typing import Protocol

from shared.spec import Bucket
from train.draws import SampleDraws, draw_samples, sample_keys
from train.index_columns import Array
from train.plan import BatchPlan

_CAPTION_MULTIPLE = 16


class SampleColumns(Protocol):
    """Of an index, what draws depend on; see ``train.index_columns.IndexColumns``."""

    @property
    def identity(self) -> Array: ...
    @property
    def caption_start(self) -> Array: ...
    @property
    def num_tokens(self) -> Array: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """The samples (N,) of a step's global batch, by slot."""

    bucket: Bucket
    number: int
    """Of the batch among its bucket's."""
    rows: Array
    """(N,) of the index."""
    epochs: Array
    """(N,) the pass over its bucket in which each sample is taken."""
    captions: Array
    """(N,) numbers of the chosen captions in the index."""
    caption_length: int
    """To which captions are padded: the same on all ranks."""
    draws: SampleDraws


def draw_step(
    plan: BatchPlan, columns: SampleColumns, step: int, *, seed: int, caption_dropout: float, max_tokens: int
) -> StepSamples:
    """Returns what a step takes.

    Args:
        plan: Of the run.
        columns: Of the index.
        step: Counted from 0.
        seed: Of the run.
        caption_dropout: How often the null caption is trained.
        max_tokens: Of a caption.
    """
    bucket, number = plan.locate(step)
    rows, epochs = plan.walk(bucket).take(number, slice(None))
    starts = columns.caption_start[rows]
    keys = sample_keys(seed, epochs, columns.identity[rows])
    draws = draw_samples(keys, columns.caption_start[rows + 1] - starts, caption_dropout=caption_dropout)
    captions = starts + draws.caption
    return StepSamples(
        bucket=bucket,
        number=number,
        rows=rows,
        epochs=epochs,
        captions=captions,
        caption_length=padded_length(int(columns.num_tokens[captions].max()), max_tokens),
        draws=draws,
    )


def padded_length(longest: int, max_tokens: int) -> int:
    """Returns the length to which captions are padded: a multiple of 16, but at most ``max_tokens``.

    GPU kernels are planned anew for each length that they meet, which costs more than the padding.
    """
    return min(max_tokens, -(-longest // _CAPTION_MULTIPLE) * _CAPTION_MULTIPLE)
