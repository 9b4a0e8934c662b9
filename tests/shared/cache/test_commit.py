"""Exactly once: what a writer that dies leaves behind, and what a second writer does; on a disk and on S3."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.cache.check import check_files
from shared.cache.commit import ShardWriter
from shared.cache.committed import read_committed
from shared.cache.dataset import Cache
from shared.cache.removal import remove_samples
from shared.cache.rows import sample_row, text_row
from shared.codec import Codec
from shared.errors import InputError
from shared.stores.open import open_store
from tests.s3 import MotoS3, S3Server, s3_environment
from tests.shared.cache.conftest import BUCKET, PROVENANCE, ShardMaker, make_sample
from tests.shared.stores.proxy import running_proxy

CODECS = {stream: Codec.parse("bfloat16") for stream in ("latent", "text.t5")}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place for a cache."""
    if request.param == "disk":
        return str(tmp_path / "cache")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"{s3.url}/{tmp_path.name}"


def names(cache: Cache) -> list[str]:
    return [entry.path for entry in cache.store.list() if entry.path.startswith(("shards/", "index/"))]


@pytest.mark.parametrize(
    "phase",
    [
        "between samples",
        "before the shard has its name",
        "before the fragment",
        "before the fragment has its name",
    ],
)
def test_a_writer_that_is_killed_before_its_fragment_leaves_nothing_that_a_reader_sees(
    url: str, write_shard: ShardMaker, phase: str
) -> None:
    if url.startswith("s3") and phase == "before the fragment has its name":
        pytest.skip("an object store has no such phase")
    cache = Cache.open_or_create(url, PROVENANCE)
    script = Path(__file__).with_name("killed_writer.py")
    killed = subprocess.run([sys.executable, script, url, phase], env=os.environ, check=False, timeout=120)
    assert killed.returncode == -9
    assert len(cache.read_index()) == 0
    assert len([name for name in names(cache) if name.startswith("shards/")]) == phase.startswith("before the fragment")
    assert not [finding for finding in check_files(cache) if finding.is_fault]
    assert write_shard(url, [0, 1]).created
    assert len(cache.read_index()) == 2
    assert len(names(cache)) == 2
    assert not [finding for finding in check_files(cache) if finding.is_fault]


def test_a_writer_that_is_killed_after_its_fragment_has_committed(url: str, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(url, PROVENANCE)
    script = Path(__file__).with_name("killed_writer.py")
    killed = subprocess.run([sys.executable, script, url, "after all"], env=os.environ, check=False, timeout=120)
    assert killed.returncode == -9
    assert len(cache.read_index()) == 2
    assert not write_shard(url, [0, 1]).created


def test_an_error_while_a_shard_is_written_leaves_no_file(tmp_path: Path) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    writer = ShardWriter(cache.store, shard_id="5" * 32, folder=str(BUCKET), container="tar", record={})

    def add_and_fail() -> None:
        writer.add(*sample_row(make_sample(0), CODECS, 0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), writer:
        add_and_fail()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["dataset.json"]


def test_the_second_writer_of_a_shard_changes_nothing(url: str, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(url, PROVENANCE)
    assert write_shard(url, [0, 1, 2]).created
    before = {name: cache.store.read(name) for name in names(cache)}
    assert not write_shard(url, [0, 1, 2]).created
    assert not write_shard(url, [0, 1, 2], codec="float32").created
    assert not write_shard(url, [0, 1, 2], container="zarr").created
    assert {name: cache.store.read(name) for name in names(cache)} == before


def test_of_many_writers_at_once_exactly_one_commits(url: str, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(url, PROVENANCE)
    with ThreadPoolExecutor(8) as pool:
        containers = ["tar", "zarr"] * 4
        committed = list(pool.map(lambda container: write_shard(url, [0, 1], container=container), containers))
    assert [shard.created for shard in committed].count(True) == 1
    (winner,) = (shard for shard in committed if shard.created)
    assert {row["latent"]["shard"] for row in cache.read_index().to_pylist()} == {winner.shard}
    assert cache.store.size(winner.shard) == winner.num_bytes
    assert not [finding for finding in check_files(cache) if finding.is_fault]


def test_throttling_lost_answers_and_resets_change_nothing(
    s3: S3Server, tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy(s3.endpoint) as proxy:
        for name, value in s3_environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        url = f"{s3.url}/{tmp_path.name}"
        proxy.lose_answers(1, method="PUT", part_of_path="dataset.json")
        cache = Cache.open_or_create(url, PROVENANCE)
        proxy.refuse(2, method="PUT", part_of_path="/shards/")
        proxy.lose_answers(1, method="PUT", part_of_path="/shards/")
        proxy.lose_answers(1, method="PUT", part_of_path="/index/")
        proxy.reset(1, method="PUT", part_of_path="/index/")
        assert write_shard(url, [0, 1, 2]).created, "its own fragment was taken for another's"
        assert not write_shard(url, [0, 1, 2]).created
        proxy.refuse(2, method="GET", part_of_path="/index/")
        assert len(cache.read_index()) == 3
        assert proxy.num_faults_left() == 0
    assert not [finding for finding in check_files(cache) if finding.is_fault]


def test_a_shard_without_samples_is_not_written(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    assert write_shard(cache.url, []).num_samples == 0
    assert names(cache) == []
    assert list(cache.store.leftovers()) == []


def test_a_value_that_the_codec_cannot_hold_is_refused_and_the_others_are_written(tmp_path: Path) -> None:
    sample = make_sample(0)
    sample.latent[0] = float("nan")
    store = open_store(tmp_path)
    with ShardWriter(store, shard_id="d" * 32, folder=str(BUCKET), container="tar", record={}) as writer:
        with pytest.raises(InputError):
            sample_row(sample, CODECS, 0)
        writer.add(*sample_row(make_sample(1), CODECS, 0))
        assert writer.commit().num_samples == 1


def test_a_removed_sample_is_gone_and_can_be_encoded_again(url: str, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(url, PROVENANCE)
    write_shard(url, [0, 1])
    assert remove_samples(cache, [f"{1:032x}", f"{7:032x}"]) == 1
    assert remove_samples(cache, [f"{1:032x}"]) == 0
    committed = read_committed(cache, "text.t5")
    assert committed.samples() == [f"{0:032x}"]
    assert committed.removed.by_sample() == {f"{1:032x}": 0}
    write_shard(url, [1], shard_id="7" * 32, generation=1)
    assert cache.read_index()["sample"].to_pylist() == [f"{0:032x}", f"{1:032x}"]


def test_new_texts_of_a_sample_replace_its_texts_only(cache: Cache) -> None:
    before = {row["sample"]: row for row in cache.read_index().to_pylist()}
    new = make_sample(9).texts["text.t5"][:1]
    with ShardWriter(cache.store, shard_id="e" * 32, folder="text.t5", container="zarr", record={}) as writer:
        writer.add(*text_row(f"{1:032x}", "text.t5", new, CODECS["text.t5"], 1))
        shard = writer.commit()
    after = {row["sample"]: row for row in cache.read_index().to_pylist()}
    changed = after.pop(f"{1:032x}")
    original = before.pop(f"{1:032x}")
    assert after == before
    assert changed["latent"] == original["latent"]
    assert [caption["caption"] for caption in changed["text.t5"]["captions"]] == ["Caption 9"]
    assert changed["text.t5"]["captions"][0]["shard"] == shard.shard
