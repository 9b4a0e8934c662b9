"""Reading tar shards by megatron-energon, as docs/maintenance.md says. Needs ``pip install megatron-energon``."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache.compact import compact
from shared.cache.urls import live_shards
from tests.shared.cache.conftest import ShardMaker
from tests.shared.cache.edited_cache import contents, make_edited_cache

energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")


@energon.stateless
def as_stored(sample: dict) -> dict:
    return {**energon.basic_sample_keys(sample), **{name: sample[name] for name in ("latent", "json")}}


class Encoder(energon.DefaultTaskEncoder):
    decoder = None
    cookers = [energon.Cooker(as_stored)]  # noqa: RUF012 - energon reads it from the class.


def test_energon_reads_every_sample_of_a_compacted_cache(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    compact(cache, 10**9)
    folder = tmp_path / "energon"
    folder.mkdir()
    for shard in live_shards(cache):
        (folder / Path(shard.url).name).symlink_to(shard.url)
    command = [str(Path(sys.executable).parent / "energon"), "prepare", "--non-interactive", "--no-progress"]
    command += ["--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    dataset = energon.get_train_dataset(
        folder,
        task_encoder=Encoder(),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        repeat=False,
    )
    found = {sample["__key__"]: sample["latent"] for sample in energon.get_loader(dataset)}
    assert found == {key: row["latent"]["payload"] for key, row in contents(cache).items()}
