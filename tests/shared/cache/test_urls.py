"""The shards of a cache for other readers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from shared.cache.compact import compact
from shared.cache.convert import convert
from shared.cache.dataset import Cache
from shared.cache.fragments import fragment_bytes, fragment_path, read_fragment, read_record
from shared.cache.urls import live_shards, warnings
from shared.errors import InputError
from shared.spec import Bucket
from tests.shared.cache.conftest import BUCKET, ShardMaker
from tests.shared.cache.edited_cache import contents, make_edited_cache


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.cache", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_live_sample_lies_in_one_of_the_shards(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    shards = live_shards(cache)
    assert [shard.num_samples for shard in shards] == [1, 2, 1, 2]
    assert [shard.num_dead for shard in shards] == [0, 1, 0, 0]
    assert {shard.url for shard in shards} == {
        f"{tmp_path}/cache/{row['latent']['shard']}" for row in cache.read_index().to_pylist()
    }
    assert live_shards(cache, Bucket(1, 16, 16)) == []


def test_the_printed_shards_are_read_by_plain_webdataset(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    compact(cache, 10**9)
    printed = run("urls", cache.url, "--bucket", BUCKET)
    assert printed.returncode == 0, printed.stderr
    samples = {
        sample["__key__"]: sample["latent"]
        for sample in webdataset.WebDataset(printed.stdout.split(), shardshuffle=False)
    }
    assert samples == {key: row["latent"]["payload"] for key, row in contents(cache).items()}
    lines = [json.loads(line) for line in run("urls", cache.url, "--json").stdout.splitlines()]
    assert [(line["bucket"], line["samples"], line["samples_without_text"]) for line in lines] == [(str(BUCKET), 6, 2)]


def test_what_plain_readers_would_get_wrong_is_said(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = make_edited_cache(tmp_path / "cache", write_shard)
    assert [line.split()[0] for line in warnings(live_shards(cache))] == ["1", "4"]
    convert(cache, str(tmp_path / "zarr"), "zarr")
    assert warnings(live_shards(Cache.open(tmp_path / "zarr")))[-1].startswith("Zarr shards")


def test_a_shard_that_no_fragment_records_is_one_line(cache: Cache) -> None:
    record = read_record(cache.store, "a" * 32)
    shard = record.pop("shard")
    rows = read_fragment(cache.store, fragment_path("a" * 32)).replace_schema_metadata(None)
    cache.store.write(fragment_path("a" * 32), fragment_bytes(rows, record))
    for command in (live_shards, lambda opened: compact(opened, 10**9)):
        with pytest.raises(InputError, match=f"{shard}: rows name it, no fragment does: run preprocess.verify"):
            command(cache)


def test_the_commands_work_together(tmp_path: Path, cache: Cache) -> None:
    assert "2 shards written, 0 were there" in run("convert", cache.url, tmp_path / "z", "--container", "zarr").stdout
    assert "snapshots/000001.parquet: 4 samples" in run("compact", tmp_path / "z").stdout
    assert "nothing to delete" in run("gc", tmp_path / "z").stdout
    assert "would delete 2 covered fragments" in run("gc", tmp_path / "z", "--older-than", "0m", "--dry-run").stdout
    assert len(run("urls", tmp_path / "z").stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [("compact",), ("gc",), ("urls",), ("refused",), ("convert", "--container", "tar", "x")]
)
def test_what_is_no_cache_is_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    failed = run(command[0], tmp_path, *command[1:])
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
