"""Exactly once: what a writer that dies leaves behind, and what a second writer does."""

from pathlib import Path

import pytest

from shared import storage
from shared.cache import commit
from shared.cache.check import check_files
from shared.cache.dataset import Cache
from shared.errors import InputError
from tests.shared.cache.conftest import PROVENANCE, ShardMaker, make_sample


class Died(BaseException):
    """Stands for the death of the process: nothing but cleaning up by the context may follow it."""


@pytest.mark.parametrize("phase", ["publish", "write_if_absent"])
def test_a_writer_that_dies_before_its_fragment_leaves_nothing_that_a_reader_sees(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(commit, phase, die)
        with pytest.raises(Died):
            write_shard(cache.root, [0, 1])
    assert cache.committed_samples() == {}
    findings = list(check_files(cache))
    assert len(findings) == 1
    assert not findings[0].is_fault
    again = write_shard(cache.root, [0, 1])
    assert again.created
    assert len(cache.committed_samples()) == 2
    assert not [finding for finding in check_files(cache) if finding.is_fault]


def test_an_error_while_a_shard_is_written_leaves_no_file(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    with pytest.raises(InputError):
        write_shard(cache.root, [0], codec="int3")
    assert not [path for path in cache.root.rglob("*") if path.is_file() and path.name != "dataset.json"]


def test_the_second_writer_of_a_shard_changes_nothing(cache: Cache, write_shard: ShardMaker) -> None:
    before = {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file()}
    same = write_shard(cache.root, [0, 1, 2], shard_id="a" * 32)
    other_bytes = write_shard(cache.root, [0, 1, 2], shard_id="a" * 32, codec="float32")
    assert not same.created
    assert not other_bytes.created
    assert {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file()} == before


def test_a_shard_without_samples_is_not_written(tmp_path: Path, write_shard: ShardMaker) -> None:
    cache = Cache.open_or_create(tmp_path / "cache", PROVENANCE)
    assert write_shard(cache.root, []).num_samples == 0
    assert not list(cache.root.rglob("*.tar"))
    assert not list(cache.root.rglob(f"{storage.TEMPORARY_PREFIX}*"))


def test_a_value_that_the_codec_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sample = make_sample(0)
    sample.latent[0] = float("nan")
    with commit.ShardWriter(
        tmp_path, shard_id="d" * 32, bucket=sample.bucket, codec="bfloat16", clips_root=Path(), environment={}
    ) as writer:
        with pytest.raises(InputError):
            writer.add(sample)
        writer.add(make_sample(1))
        assert writer.commit().num_samples == 1
    cache = Cache.open_or_create(tmp_path / "other", PROVENANCE)
    assert cache.committed_samples() == {}


def test_of_two_writers_of_one_name_one_succeeds(tmp_path: Path) -> None:
    assert storage.write_if_absent(tmp_path / "name", b"first")
    assert not storage.write_if_absent(tmp_path / "name", b"second")
    assert (tmp_path / "name").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
