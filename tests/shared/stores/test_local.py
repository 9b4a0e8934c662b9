"""Stores on a file system that is full, read-only, slow to answer or poor in features."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.stores import files
from shared.stores.local import NUM_OPEN_FILES, LocalStore
from shared.stores.store import StoreError, StoreFullError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def write_whole(store: LocalStore, num_bytes: int) -> None:
    store.write("shards/a.tar", b"x" * num_bytes)


def claim(store: LocalStore, num_bytes: int) -> None:
    store.write_if_absent("shards/a.tar", b"x" * num_bytes)


def publish_in_pieces(store: LocalStore, num_bytes: int) -> None:
    with store.new_file() as new:
        for _ in range(num_bytes // 1000):
            new.file.write(b"x" * 1000)
        new.publish("shards/a.tar")


WRITERS = [write_whole, claim, publish_in_pieces]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_clear_line_and_leaves_the_store_whole(
    small_disk: Path, write: Callable[[LocalStore, int], None]
) -> None:
    store = LocalStore(small_disk / "cache")
    store.write("index/ab.parquet", b"committed")
    with pytest.raises(StoreFullError, match="the disk is full .* bytes free.* make room") as caught:
        write(store, 2_000_000)
    assert str(small_disk) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["ab.parquet"]
    assert store.read("index/ab.parquet") == b"committed"
    write(store, 500_000)
    assert store.size("shards/a.tar") == 500_000


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
sys.path.insert(0, ".")
from shared.stores.local import LocalStore
from shared.stores.store import StoreFullError
from tests.shared.stores.test_local import WRITERS
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in WRITERS:
    try:
        write(LocalStore(Path(sys.argv[1])), 200_000)
    except StoreFullError as error:
        print(error)
"""


def test_a_limit_on_the_size_of_files_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path / "cache")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(WRITERS)
    assert all("ulimit -f" in line for line in lines)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("write", WRITERS)
def test_a_read_only_file_system_is_one_clear_line(small_disk: Path, write: Callable[[LocalStore, int], None]) -> None:
    LocalStore(small_disk).write("a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="read-only file system"):
        write(LocalStore(small_disk), 1000)
    with pytest.raises(StoreError, match="read-only file system"):
        LocalStore(small_disk).delete("a")
    assert LocalStore(small_disk).read("a") == b"x"


AS_NOBODY = """
import os, sys
from pathlib import Path
sys.path.insert(0, ".")
from shared.stores.store import StoreError
from tests.shared.stores.test_local import WRITERS, LocalStore
if os.geteuid() == 0:
    os.setuid(65534)
for write in WRITERS:
    try:
        write(LocalStore(Path(sys.argv[1])), 1000)
    except StoreError as error:
        print(error)
"""


def test_a_folder_that_may_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o555)
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o011)
    command = [sys.executable, "-c", AS_NOBODY, str(folder)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(WRITERS)
    assert all(f"{folder}: permission denied" in line for line in lines)


def refuse_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_claim_without_hard_links_is_still_won_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    store = LocalStore(tmp_path)
    assert store.write_if_absent("index/a", b"first")
    assert not files.publish_if_absent(make_temporary(tmp_path, b"second"), tmp_path / "index" / "a")
    assert store.read("index/a") == b"first"
    assert list(store.leftovers()) == []


def make_temporary(folder: Path, data: bytes) -> Path:
    temporary = files.temporary_path(folder)
    with files.durable_file(temporary) as file:
        file.write(data)
    return temporary


def test_of_two_that_both_found_the_name_free_one_wins(tmp_path: Path) -> None:
    first, second = make_temporary(tmp_path, b"first"), make_temporary(tmp_path, b"second")
    assert files.publish_if_absent(first, tmp_path / "index" / "a")
    assert not files.publish_if_absent(second, tmp_path / "index" / "a")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]
    assert (tmp_path / "index" / "a").read_bytes() == b"first"


def test_a_claim_whose_link_was_made_but_answered_by_an_error_is_won(tmp_path: Path) -> None:
    temporary = make_temporary(tmp_path, b"ours")
    os.link(temporary, tmp_path / "a")  # What the server did; over NFS the client now asks again.
    assert files.publish_if_absent(temporary, tmp_path / "a")


def publish_slowly(store: LocalStore) -> None:
    with store.new_file() as new:
        while True:
            new.file.write(b"x" * 1_000_000)
            time.sleep(0.01)


def test_a_writer_killed_while_it_writes_leaves_a_leftover_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "cache")
    process = multiprocessing.get_context("spawn").Process(target=publish_slowly, args=(store,))
    process.start()
    while not any(entry.num_bytes > 2_000_000 for entry in store.leftovers()):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(store.list()) == []
    (leftover,) = store.leftovers()
    store.delete(leftover.path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_store_keeps_few_files_open_and_none_that_is_gone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(2 * NUM_OPEN_FILES):
        store.write(f"{number}", b"x")
        assert store.read_range(f"{number}", 0, 1) == b"x"
    assert len(os.listdir("/proc/self/fd")) == before + NUM_OPEN_FILES
    for number in range(2 * NUM_OPEN_FILES):
        store.delete(f"{number}")
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > NUM_OPEN_FILES


def test_a_child_forked_while_a_thread_opens_a_file_reads_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"0123456789")
    assert store.read_range("a", 3, 2) == b"34"
    context = multiprocessing.get_context("fork")
    with store._open_files._lock:  # As if another thread were just about to read.
        process = context.Process(target=store.read_range, args=("a", 5, 2))
        process.start()
    process.join(20)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_file_gets_the_mode_of_a_new_one_without_the_umask_being_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (usual := tmp_path / "usual").touch()
    own = tmp_path / "own"
    own.touch(mode=0o600)
    monkeypatch.setattr(os, "umask", None)
    files.give_usual_mode(own)
    assert own.stat().st_mode == usual.stat().st_mode != 0o100600
    assert sorted(tmp_path.iterdir()) == [own, usual]


def test_a_file_stays_where_its_mode_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    own = tmp_path / "own"
    own.touch(mode=0o600)
    monkeypatch.setattr(Path, "chmod", refuse)
    files.give_usual_mode(own)
    assert list(tmp_path.iterdir()) == [own]
