"""The cache that stage 1 makes of a manifest, made by its own code, without Ray."""

from pathlib import Path

from preprocess.config import PreprocessConfig
from preprocess.encode import ShardEncoder
from preprocess.encoders import Encoders
from preprocess.work import find_work
from shared.cache.dataset import Cache
from shared.clips.decode import decode_sample
from shared.clips.probes import Probes, probe_file
from shared.media.manifest import read_manifest
from shared.stores.local import LocalStore


def encode_cache(config: PreprocessConfig, probes_folder: Path) -> Cache:
    """Returns the cache of a manifest, encoded in this process.

    Args:
        config: What stage 1 is told.
        probes_folder: For the probes.
    """
    config = config.resolved()
    manifest, probes = read_manifest(config.manifest), Probes.open(LocalStore(probes_folder))
    probes.add([clip for task in probes.missing(manifest) for file in task.files for clip in probe_file(file)])
    encoders = Encoders(config)
    cache = Cache.open_or_create(config.output, encoders.provenance())
    shards = ShardEncoder(encoders, config, manifest.root)
    for task in find_work(config, manifest, probes.table_for(manifest), cache).shards:
        frames = [decode_sample(sample, task.bucket) for sample in task.samples]
        for _ in shards.encode_shard(cache.store, task, frames):
            pass
    return cache
