"""Samples of a run that are always the same, one at a time: of what it holds out, or of what it trains on."""

from collections.abc import Iterator
from dataclasses import dataclass

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.spec import Bucket
from train.chosen_rows import Selection
from train.config import TrainConfig
from train.data import Batch
from train.loader import load_batches
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import SampleIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedSamples:
    """Some samples, in an order that the seed decides, mixed over the buckets as in training."""

    index: SampleIndex
    plan: BatchPlan
    """Of batches of one sample."""
    number: int
    """Samples, at most those that there are."""
    config: TrainConfig

    @classmethod
    def open(cls, config: TrainConfig, number: int, *, held_out: bool) -> "FixedSamples":
        """Returns the first ``number`` samples.

        Args:
            config: Of the run.
            number: Fewer where there are not so many.
            held_out: Of what ``--holdout`` keeps from training, or of the rest.

        Raises:
            InputError: if there are none.
        """
        data = config.data
        assert config.cache is not None
        selection = Selection(where=data.where, holdout=data.holdout, held_out_side=held_out)
        index = SampleIndex.open(Cache.open(config.cache), selection, local_cache=data.local_cache)
        buckets = index.buckets
        if data.buckets:  # what is held out need not have all of them
            wanted = {Bucket.parse(name) for name in data.buckets}
            buckets = {bucket: rows for bucket, rows in index.buckets.items() if bucket in wanted}
        if not buckets:
            raise InputError(
                f"holdout={data.holdout}: no sample of {', '.join(data.buckets)} is held out, but of "
                f"{', '.join(map(str, sorted(index.buckets)))}: hold out more, or train on more --buckets"
            )
        plan = BatchPlan(buckets, batch_sizes=dict.fromkeys(buckets, 1), seed=config.seed)
        return cls(index=index, plan=plan, number=min(number, plan.num_samples), config=config)

    def read(self, numbers: range) -> Iterator[Batch]:
        """Yields some of the samples, one a batch, with their captions."""
        job = LoaderJob.of_index(
            self.index,
            self.plan,
            rank=0,
            world_size=1,
            seed=self.config.seed,
            caption_dropout=0.0,
            on_corrupt="stop",
            copies=None,
        )
        return load_batches(job, numbers, num_workers=0, pin_memory=False)

    def share(self, rank: int, num_ranks: int) -> range:
        """Returns the samples of one of ``num_ranks``."""
        return range(self.number * rank // num_ranks, self.number * (rank + 1) // num_ranks)
