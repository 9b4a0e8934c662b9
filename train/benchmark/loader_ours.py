"""One measurement of this project's loader, in a process of its own: ``python -m train.benchmark.loader_ours JSON``."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from shared.cache.dataset import Cache
from train.loader import load_batches
from train.local_copies import LocalCopies
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import SampleIndex


def measure(
    *, cache: str, batch_size: int, num_workers: int, num_batches: int, index_folder: str, step_seconds: float = 0.0
) -> dict[str, Any]:
    """Returns what reading took, from the first batch on, and how long steps waited.

    Args:
        cache: Folder or URL.
        batch_size: Samples.
        num_workers: Processes.
        num_batches: To read; the first is not counted.
        index_folder: Where the node's index goes.
        step_seconds: How long each step computes.
    """
    opened = Cache.open(cache)
    folder = Path(index_folder)
    index = SampleIndex.open(opened, local_cache=folder)
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=0)
    copies: LocalCopies | None = None
    job = LoaderJob.of_index(
        index, plan, rank=0, world_size=1, seed=0, num_levels=1000, caption_dropout=0.1, copies=copies
    )
    waits, delivered = [], 0
    start = waiting_since = 0.0
    for number, batch in enumerate(load_batches(job, range(num_batches), num_workers=num_workers, pin_memory=False)):
        now = time.perf_counter()
        if number == 0:
            start = now
        else:
            waits.append(now - waiting_since)
            valid = int(batch.mask.sum()) * batch.captions.shape[-1] * batch.captions.element_size()
            delivered += batch.latents.nbytes + valid
        if step_seconds:
            time.sleep(step_seconds)
        waiting_since = time.perf_counter()
    seconds = waiting_since - start
    return {
        "samples": batch_size * (num_batches - 1),
        "seconds": seconds,
        "delivered_bytes": delivered,
        "wait_seconds": waits,
        "run_samples": {str(bucket): rows.run_samples for bucket, rows in index.buckets.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
