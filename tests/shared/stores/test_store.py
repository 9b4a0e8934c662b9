"""What holds for every store."""

import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InputError
from shared.stores.open import open_store
from shared.stores.store import Store, StoreError
from tests.shared.stores.proxy import Proxy


def test_what_is_written_is_read_back_whole_and_in_ranges(store: Store) -> None:
    store.write("index/ab.parquet", b"0123456789")
    assert store.read("index/ab.parquet") == b"0123456789"
    assert store.size("index/ab.parquet") == 10
    assert store.read_range("index/ab.parquet", 2, 3) == b"234"
    assert store.read_range("index/ab.parquet", 8, 100) == b"89"
    assert store.read_range("index/ab.parquet", 10, 5) == b""
    assert store.read_range("index/ab.parquet", 4, 0) == b""


def test_ranges_come_in_the_order_asked_for_whatever_they_overlap_and_wherever_the_object_ends(store: Store) -> None:
    data = bytes(range(256)) * 8192
    store.write("shard.tar", data)
    far = len(data) - 3
    ranges = [
        (far, 100),
        (0, 50),
        (5, 20),
        (30, 40),
        (1_000_000, 7),
        (12, 0),
        (0, 10),
        (len(data) + 5, 4),
        (600_000, 300_000),
        (650_000, 9),
    ]
    assert store.read_ranges("shard.tar", ranges) == [data[offset : offset + length] for offset, length in ranges]
    assert store.read_ranges("shard.tar", []) == []


def test_a_missing_object_is_a_file_not_found_error_and_has_no_size(store: Store) -> None:
    for read in (store.read, lambda path: store.read_range(path, 0, 1), lambda path: store.read_ranges(path, [(9, 1)])):
        with pytest.raises(FileNotFoundError, match="index/gone.parquet"):
            read("index/gone.parquet")
    assert store.size("index/gone.parquet") is None
    store.write("index/gone.parquet", b"x")
    assert store.size("index") is None, "a folder is no object"


def test_a_listing_gives_everything_below_a_folder_sorted_by_path(store: Store) -> None:
    names = ["a/b/2.tar", "a/b/1.tar", "a-b/3.tar", "a/4.tar", "ab/5.tar", "a/b/c/d/6 7%20é.tar"]
    for number, name in enumerate(names):
        store.write(name, b"x" * number)
    assert [entry.path for entry in store.list()] == sorted(names)
    below = {entry.path: entry for entry in store.list("a")}
    assert list(below) == ["a/4.tar", "a/b/1.tar", "a/b/2.tar", "a/b/c/d/6 7%20é.tar"]
    assert below["a/4.tar"].num_bytes == 3
    assert abs(below["a/4.tar"].modified - datetime.now(UTC)) < timedelta(minutes=5)
    assert list(store.list("nothing/here")) == []


def test_writing_again_replaces_also_what_was_open_for_reading(store: Store) -> None:
    store.write("README.md", b"first")
    assert store.read_range("README.md", 0, 5) == b"first"
    store.write("README.md", b"again")
    assert store.read_range("README.md", 0, 5) == b"again"


def test_an_object_is_deleted_once_or_twice(store: Store) -> None:
    store.write("a/b", b"x")
    assert store.read_range("a/b", 0, 1) == b"x"
    store.delete("a/b")
    store.delete("a/b")
    assert list(store.list()) == []
    with pytest.raises(FileNotFoundError):
        store.read_range("a/b", 0, 1)


def test_a_large_object_is_seen_only_after_it_is_published(store: Store) -> None:
    part = bytes(range(251)) * 10_000
    with store.new_file() as new:
        for _ in range(20):
            new.file.write(part)
        new.file.seek(1)
        new.file.write(b"patched")
        assert list(store.list()) == []
        new.publish("shards/a/1.tar")
    data = bytearray(part * 20)
    data[1:8] = b"patched"
    assert store.read("shards/a/1.tar") == data
    assert [entry.path for entry in store.list()] == ["shards/a/1.tar"]
    assert list(store.leftovers()) == []


def test_an_object_that_is_not_published_leaves_nothing(store: Store) -> None:
    with store.new_file() as new:
        new.file.write(b"x" * 1_000_000)
    with pytest.raises(StoreError, match="encoding failed"):
        fail_inside_a_new_file(store)
    assert list(store.list()) == []
    assert list(store.leftovers()) == []


def fail_inside_a_new_file(store: Store) -> None:
    with store.new_file() as new:
        new.file.write(b"x" * 1_000_000)
        raise StoreError("encoding failed")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb", "a/\0"])
def test_a_path_that_could_lead_out_of_the_root_is_refused(store: Store, path: str) -> None:
    for use in (store.read, store.size, store.delete, store.local_path, lambda path: store.write(path, b"")):
        with pytest.raises(ValueError, match="no relative path"):
            use(path)


def test_of_two_claims_the_first_wins_and_stays(store: Store) -> None:
    assert store.write_if_absent("index/ab.parquet", b"first")
    assert not store.write_if_absent("index/ab.parquet", b"second")
    assert store.read("index/ab.parquet") == b"first"
    assert list(store.leftovers()) == []


def claim(store: Store, barrier: Any, writer: int, wins: Any) -> None:
    for number in range(20):
        barrier.wait()
        if store.write_if_absent(f"index/{number}.parquet", f"{writer}".encode() * 1000):
            wins.put((number, writer))
    wins.put(None)


def test_of_two_processes_that_race_for_a_claim_exactly_one_wins(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(2), context.Queue()
    racers = [context.Process(target=claim, args=(store, barrier, writer, wins)) for writer in range(2)]
    for racer in racers:
        racer.start()
    found = []
    for _ in racers:
        while (win := wins.get(timeout=60)) is not None:
            found.append(win)
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert sorted(number for number, _ in found) == list(range(20))
    for number, writer in found:
        assert store.read(f"index/{number}.parquet") == f"{writer}".encode() * 1000


def test_threads_read_from_more_objects_than_are_kept_open(store: Store) -> None:
    for number in range(80):
        store.write(f"{number}.tar", bytes([number]) * 100)
    begin = threading.Barrier(4)

    def read_all(thread: int) -> bool:
        begin.wait()
        numbers = [(number * 7 + thread) % 80 for number in range(240)]
        return all(store.read_range(f"{number}.tar", 90, 20) == bytes([number]) * 10 for number in numbers)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(4)))


def test_a_pickled_store_is_the_same_place(store: Store) -> None:
    store.write("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read("a") == b"x"
    assert str(copy) == copy.url == store.url


def test_a_folder_is_opened_from_a_path_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("cache folder").write("a", b"x")
    for url in (tmp_path / "cache folder", f"file://{tmp_path}/cache%20folder", f"{tmp_path}/cache folder/"):
        assert open_store(url).read("a") == b"x"
        assert open_store(url).url == str(tmp_path / "cache folder")
    local = open_store("cache folder").local_path("a")
    assert local is not None
    assert local.read_bytes() == b"x"


@pytest.mark.parametrize("url", ["", "http://bucket/a", "s3://", "s3:///a", "s3://bucket/a/../b", "file://host/a"])
def test_what_is_no_store_is_refused(proxy: Proxy, url: str) -> None:
    with pytest.raises(InputError):
        open_store(url)
