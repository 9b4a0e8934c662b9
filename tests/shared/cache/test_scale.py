"""Reading a large index: what is fetched, what overlays do. ``scale.py`` beside this measures seconds and memory."""

from pathlib import Path

import pytest

from shared.cache.dataset import Cache
from shared.cache.inventory import take_inventory
from shared.cache.ranged_file import RangedFile
from shared.stores.local import LocalStore
from tests.shared.cache.scale import LOADER_COLUMNS, make_cache


class FarStore(LocalStore):
    """A folder that is read as if it were a bucket; counts what is fetched."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[tuple[str, int]] = []

    def local_path(self, path: str) -> None:  # type: ignore[override]
        return None

    def _near(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def read(self, path: str) -> bytes:
        data = self._near(path)
        self.fetched.append((path, len(data)))
        return data

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        data = self._near(path)[offset : offset + length]
        self.fetched.append((path, len(data)))
        return data

    def size(self, path: str) -> int | None:
        return (self._root / path).stat().st_size

    def list(self, prefix: str = ""):  # type: ignore[override]
        return LocalStore(self._root).list(prefix)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """80,000 samples in a snapshot, 2,000 of them with newer texts, and 20 fragments."""
    root = tmp_path_factory.mktemp("large") / "cache"
    return make_cache(root, num_samples=80_000, num_fragments=20, num_overlays=2000)


def test_the_loaders_columns_of_snapshot_fragments_and_overlays_are_one_table(large: Cache) -> None:
    index = large.read_index(LOADER_COLUMNS)
    assert index.num_rows == 80_000 + 20 * 64
    generations = index["text.t5"].combine_chunks().field("generation").to_numpy()
    assert (generations[:2000] == 1).all()
    assert (generations[2000:] == 0).all()


def test_only_the_columns_asked_for_are_fetched_of_a_snapshot_in_a_bucket(large: Cache) -> None:
    store = FarStore(Path(large.url))
    far = Cache(store, large.provenance, large.version)
    (part,) = large.index_files().parts
    whole = large.store.size(part)
    assert whole is not None
    assert whole > 7_000_000
    index = far.read_index(["fps"])
    fetched = sum(num_bytes for path, num_bytes in store.fetched if path == part)
    assert fetched < whole / 2
    assert index.equals(large.read_index(["fps"]))


def test_opening_a_snapshot_reads_none_of_the_fragments_that_it_covers(large: Cache) -> None:
    store = FarStore(Path(large.url))
    files = Cache(store, large.provenance, large.version).index_files()
    assert len(files.fragments) == 22
    assert {path for path, _ in store.fetched} == {files.snapshot}


def test_overlays_are_counted_where_they_lie(large: Cache) -> None:
    inventory = take_inventory(large, large.index_files())
    assert len(inventory.live) == 80_000 + 20 * 64
    assert (inventory.text_bytes["text.t5"] == 590_000).all()
    assert len(inventory.positions_by_shard(inventory.latent_shard)) == 80 + 20


def test_a_ranged_file_reads_as_the_file_does(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    (tmp_path / "file").write_bytes(data)
    file = RangedFile(LocalStore(tmp_path), "file")
    for offset, length in ((0, 10), (5, 300_000), (5_000_000, 10), (5_119_999, 10), (5_120_000, 5), (3, 0), (100, -1)):
        file.seek(offset)
        assert file.read(length) == (data[offset : offset + length] if length >= 0 else data[offset:])
        assert file.tell() == min(len(data), offset + (length if length >= 0 else len(data)))
    assert file.seek(-4, 2) == len(data) - 4
    assert file.read(100) == data[-4:]
    with pytest.raises(FileNotFoundError):
        RangedFile(LocalStore(tmp_path), "missing")
