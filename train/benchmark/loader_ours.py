"""One measurement of this project's loader, in a process of its own: ``python -m train.benchmark.loader_ours JSON``."""

import json
import sys
from pathlib import Path
from typing import Any

from shared.cache.dataset import Cache
from train.benchmark.loader_rivals import timed
from train.loader import BATCHES_AHEAD, load_batches
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import SampleIndex


def measure(
    *,
    cache: str,
    batch_size: int,
    num_workers: int,
    num_batches: int,
    index_folder: str,
    cold: bool = False,
    step_seconds: float = 0.0,
) -> dict[str, Any]:
    """Returns what reading took behind the first batch.

    Args:
        cache: Folder or URL.
        batch_size: Samples.
        num_workers: Processes.
        num_batches: To read.
        index_folder: Where the node's index goes.
        cold: Have the kernel forget the cache's files first.
        step_seconds: How long each step computes.
    """
    index = SampleIndex.open(Cache.open(cache), local_cache=Path(index_folder))
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=0)
    job = LoaderJob.of_index(index, plan, rank=0, world_size=1, seed=0, caption_dropout=0.1)
    batches = load_batches(job, range(num_batches), num_workers=num_workers, pin_memory=False)
    result = timed(batches, ahead=BATCHES_AHEAD, cold=cache if cold else None, step_seconds=step_seconds)
    return {**result, "run_samples": {str(bucket): rows.run_samples for bucket, rows in index.buckets.items()}}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
