"""Where a run's batches come from."""

from collections.abc import Iterator
from functools import partial
from itertools import count

from train.data import Batch
from train.loader import load_batches
from train.local_copies import LocalCopies
from train.memory_needs import need_of_batch
from train.online.batches import OnlineJob, online_batches
from train.online.index import OnlineIndex
from train.online.index_build import REFUSED_FILE
from train.out_of_memory import Need, enough_memory
from train.parallel.ranks import Ranks
from train.rank_batches import LoaderJob
from train.run_folder import write_durably
from train.sample_index import SampleIndex
from train.setup import CheckedRun

LEDGER_FILES = "refused-rank*.jsonl"
"""In an online run's folder: of each rank, the clips that it could not decode."""


def open_batches(run: CheckedRun, ranks: Ranks, *, first_step: int) -> Iterator[Batch]:
    """Returns this rank's batches from ``first_step`` to the run's last step. All ranks take each of them together.

    Args:
        run: What to train, checked.
        ranks: This rank among the others.
        first_step: Counted from 0.

    Raises:
        InputError: where a rank cannot have a batch, on rank 0; the others exit after. Any other error on its rank.
    """
    batches = ranks.agree(lambda: _open(run, ranks, first_step))
    needs = (need_of_batch(step, run.config) for step in count(first_step + 1))
    return iter(partial(_next_of_all, batches, needs, ranks), None)


def _next_of_all(batches: Iterator[Batch], needs: Iterator[Need], ranks: Ranks) -> Batch | None:
    """Returns this rank's next batch once all ranks have theirs; None behind the last.

    A rank that failed alone would leave the others in the step that they have begun, until their time-out.
    """
    batch: Batch | None = None
    failure: Exception | None = None
    try:
        with enough_memory(next(needs), rank=ranks.rank):
            batch = next(batches, None)
    except Exception as error:
        failure = error
    if ranks.ask(lambda: failure is not None)():
        ranks.agree(partial(_raise, failure))
    return batch


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _open(run: CheckedRun, ranks: Ranks, first_step: int) -> Iterator[Batch]:
    config, data, index = run.config, run.config.data, run.index
    steps = range(first_step, config.steps)
    if isinstance(index, OnlineIndex):
        return _encoded(run, ranks, index, steps)
    assert isinstance(index, SampleIndex)
    copies = None
    if data.local_cache is not None and index.cache.store.local_path("shards") is None:
        limit_bytes = int(data.local_cache_gb * 1e9)
        copies = LocalCopies(folder=data.local_cache, limit_bytes=limit_bytes, url=index.url)
    job = LoaderJob.of_index(
        index,
        run.plan,
        rank=ranks.data_rank,
        world_size=ranks.num_data_ranks,
        seed=config.seed,
        caption_dropout=config.diffusion.caption_dropout,
        on_corrupt=data.on_corrupt,
        copies=copies,
    )
    return load_batches(
        job,
        steps,
        num_workers=data.num_workers,
        pin_memory=ranks.device.type == "cuda",
    )


def _encoded(run: CheckedRun, ranks: Ranks, index: OnlineIndex, steps: range) -> Iterator[Batch]:
    config, data, encoding = run.config, run.config.data, index.encoding
    job = OnlineJob(
        index=index,
        plan=run.plan,
        rank=ranks.data_rank,
        world_size=ranks.num_data_ranks,
        seed=config.seed,
        caption_dropout=config.diffusion.caption_dropout,
        windows=encoding.online_windows,
        on_corrupt=data.on_corrupt,
        num_workers=data.num_workers,
        timeout_seconds=encoding.decode_timeout,
        ahead_bytes=encoding.decode_ahead_mb << 20,
        ledger=config.output / LEDGER_FILES.replace("*", f"{ranks.rank:05d}"),
    )
    if ranks.is_first:
        write_durably(config.output / REFUSED_FILE, index.refusals().encode())
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(index.refused.items()))
        if told:
            print(f"not used: {told}: see {config.output / REFUSED_FILE}", flush=True)
    return online_batches(job, steps)
