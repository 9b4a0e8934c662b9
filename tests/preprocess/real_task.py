"""A shard of real clips, planned as a job plans it."""

from pathlib import Path

import numpy as np

from shared.cache.committed import Removed
from shared.clips.plan import PlanOptions, ShardTask, make_plan
from shared.clips.probes import Probes, probe_file
from shared.fingerprints import Lookup
from shared.media.manifest import read_manifest
from shared.spec import Bucket
from shared.stores.local import LocalStore
from shared.windows import Sampling


def real_task(manifest_path: Path, bucket: Bucket, folder: Path) -> ShardTask:
    """Returns a shard of all clips of a manifest that fill a bucket.

    Args:
        manifest_path: The manifest.
        bucket: Of the shard.
        folder: For the probes.
    """
    manifest, probes = read_manifest(manifest_path), Probes.open(LocalStore(folder))
    probes.add([clip for task in probes.missing(manifest) for file in task.files for clip in probe_file(file)])
    nothing = Lookup(np.empty((0, 2), np.uint64))
    options = PlanOptions(
        buckets=[bucket],
        buckets_per_clip="best",
        sampling=Sampling(),
        shard_samples=lambda _: 64,
        sample_bytes=lambda *_: 1,
        streams=("latent", "text.t5"),
    )
    plan = make_plan(
        manifest,
        probes.table_for(manifest),
        options,
        committed=nothing,
        removed=Removed.of({}),
        refused=nothing,
    )
    return plan.tasks[0]
