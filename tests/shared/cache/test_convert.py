"""Converting a cache into the other container."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.cache.convert import convert
from shared.cache.dataset import Cache
from shared.cache.null_caption import read_null_caption
from shared.cache.removal import remove_samples
from shared.errors import InputError
from shared.stores.local import LocalStore
from tests.s3 import MotoS3, S3Server
from tests.shared.cache.conftest import PROVENANCE, ShardMaker
from tests.shared.cache.edited_cache import contents, make_edited_cache, shard_names, state


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with MotoS3() as server:
        yield server


@pytest.mark.parametrize(("before", "after"), [("tar", "zarr"), ("zarr", "tar"), ("tar", "tar")])
def test_a_converted_cache_has_the_same_samples_payloads_texts_removals_and_ledger(
    tmp_path: Path, write_shard: ShardMaker, before: str, after: str
) -> None:
    source = make_edited_cache(tmp_path / "source", write_shard, container=before)
    convert(source, str(tmp_path / "target"), after)
    target = Cache.open(tmp_path / "target")
    assert state(target) == state(source)
    assert target.index_files().snapshot is None
    suffix = {"tar": ".tar", "zarr": ".zarr.zip"}[after]
    assert all(name.endswith(suffix) for name in shard_names(target))
    assert read_null_caption(target.store, "text.t5").equal(read_null_caption(source.store, "text.t5"))
    assert (tmp_path / "target" / "README.md").is_file()


def test_shards_of_texts_alone_stay_shards_of_texts_alone(tmp_path: Path, write_shard: ShardMaker) -> None:
    source = make_edited_cache(tmp_path / "source", write_shard)
    convert(source, str(tmp_path / "target"), "zarr")
    folders = [name.split("/")[1] for name in shard_names(Cache.open(tmp_path / "target"))]
    assert sorted(folders) == ["2x16x24"] * 4 + ["text.b", "text.t5", "text.t5"]


def test_from_tar_to_zarr_and_back_gives_equal_bytes(tmp_path: Path, write_shard: ShardMaker) -> None:
    root = tmp_path / "source"
    Cache.open_or_create(root, PROVENANCE)
    for codec, number in (("bfloat16", 0), ("bfloat16+zstd", 10)):
        write_shard(root, [number, number + 1], shard_id=f"{number:032x}", codec=codec)
    convert(Cache.open(root), str(tmp_path / "zarr"), "zarr")
    convert(Cache.open(tmp_path / "zarr"), str(tmp_path / "tar"), "tar")
    names = shard_names(Cache.open(root))
    assert names == shard_names(Cache.open(tmp_path / "tar"))
    assert len(names) == 2
    assert all((root / name).read_bytes() == (tmp_path / "tar" / name).read_bytes() for name in names)


def test_a_stopped_conversion_goes_on_where_it_was(
    tmp_path: Path, write_shard: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_edited_cache(tmp_path / "source", write_shard)
    target = str(tmp_path / "target")
    whole, written = LocalStore.write_if_absent, []

    def stop_at_the_third_fragment(store: LocalStore, path: str, data: bytes) -> bool:
        if path.startswith("index/"):
            written.append(path)
            if len(written) == 3:
                raise KeyboardInterrupt
        return whole(store, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_if_absent", stop_at_the_third_fragment)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, "zarr")
    assert convert(source, target, "zarr") == (5, 2)
    assert convert(source, target, "zarr") == (0, 7)
    assert state(Cache.open(target)) == state(source)
    assert len(shard_names(Cache.open(target))) == 7


def test_what_comes_to_the_source_later_is_brought_by_the_next_run(tmp_path: Path, write_shard: ShardMaker) -> None:
    source = make_edited_cache(tmp_path / "source", write_shard)
    convert(source, str(tmp_path / "target"), "zarr")
    write_shard(tmp_path / "source", [7], shard_id="7" * 32)
    remove_samples(source, [f"{3:032x}"])
    assert convert(source, str(tmp_path / "target"), "zarr")[0] == 1
    assert state(Cache.open(tmp_path / "target")) == state(source)


def test_between_a_folder_and_a_bucket(
    tmp_path: Path, write_shard: ShardMaker, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    source = make_edited_cache(tmp_path / "source", write_shard)
    convert(source, f"{s3.url}/zarr", "zarr")
    convert(Cache.open(f"{s3.url}/zarr"), str(tmp_path / "back"), "tar")
    assert contents(Cache.open(f"{s3.url}/zarr")) == contents(source)
    assert state(Cache.open(tmp_path / "back")) == state(source)


def test_a_corrupt_payload_is_not_converted(cache: Cache, tmp_path: Path) -> None:
    place = cache.read_index().to_pylist()[0]["latent"]
    path = cache.store.local_path(place["shard"])
    data = bytearray(path.read_bytes())
    data[place["offset"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{place['shard']}, offset {place['offset']}: found CRC32C"):
        convert(cache, str(tmp_path / "target"), "zarr")
    assert all(
        row["latent"]["shard"] != place["shard"] for row in Cache.open(tmp_path / "target").read_index().to_pylist()
    )


def test_a_target_with_something_else_in_it_is_refused(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "film.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="film.mp4"):
        convert(cache, str(tmp_path / "other"), "zarr")
    with pytest.raises(InputError, match="the same cache"):
        convert(cache, cache.url, "zarr")
