"""Stores on S3, with a server that answers late, wrongly or not at all."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import InputError
from shared.stores.objects import PART_BYTES, ObjectStore
from shared.stores.store import StoreError, StoreFullError
from tests.s3 import S3Server
from tests.shared.stores.proxy import Proxy

LARGE = os.urandom(2 * PART_BYTES + 12_345)


def publish(store: ObjectStore, path: str, data: bytes) -> None:
    with store.new_file() as new:
        new.file.write(data)
        new.publish(path)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
def test_throttling_is_waited_out(s3_store: ObjectStore, proxy: Proxy, status: int, code: str) -> None:
    proxy.refuse(3, status=status, code=code)
    s3_store.write("a", b"x" * 100)
    proxy.refuse(2, status=status, code=code)
    assert s3_store.read("a") == b"x" * 100
    proxy.refuse(2, status=status, code=code)
    assert s3_store.write_if_absent("b", b"y")
    proxy.refuse(2, status=status, code=code)
    assert [entry.path for entry in s3_store.list()] == ["a", "b"]
    proxy.refuse(2, status=status, code=code)
    s3_store.delete("a")
    assert s3_store.size("a") is None
    assert proxy.num_faults_left() == 0


def test_a_claim_whose_answer_is_lost_is_still_won(s3_store: ObjectStore, proxy: Proxy) -> None:
    proxy.lose_answers(1, method="PUT")
    assert s3_store.write_if_absent("index/ab.parquet", b"token of this writer")
    assert proxy.num_faults_left() == 0
    proxy.lose_answers(1, method="PUT")
    assert not s3_store.write_if_absent("index/ab.parquet", b"token of another one")
    assert s3_store.read("index/ab.parquet") == b"token of this writer"


def test_a_claim_that_never_reached_the_server_is_made_again(s3_store: ObjectStore, proxy: Proxy) -> None:
    proxy.reset(2, method="PUT")
    assert s3_store.write_if_absent("index/ab.parquet", b"mine")
    assert proxy.num_faults_left() == 0


def test_a_read_that_breaks_off_is_made_again(s3_store: ObjectStore, proxy: Proxy) -> None:
    s3_store.write("a", LARGE[:3_000_000])
    proxy.cut_answers(2, method="GET")
    assert s3_store.read("a") == LARGE[:3_000_000]
    proxy.cut_answers(1, method="GET")
    assert s3_store.read_ranges("a", [(5, 1000), (2_000_000, 10)]) == [LARGE[5:1005], LARGE[2_000_000:2_000_010]]
    assert proxy.num_faults_left() == 0


@pytest.mark.parametrize("part_of_path", ["uploads", "partNumber=2", "?uploadId="])
@pytest.mark.parametrize("fault", [Proxy.lose_answers, Proxy.reset, Proxy.refuse])
def test_a_large_upload_survives_a_fault_in_each_phase(
    s3_store: ObjectStore, proxy: Proxy, fault: Callable[..., None], part_of_path: str
) -> None:
    fault(proxy, 1, part_of_path=part_of_path)
    publish(s3_store, "shards/a.tar", LARGE)
    assert proxy.num_faults_left() == 0
    assert s3_store.read("shards/a.tar") == LARGE


@pytest.mark.slow
def test_throttling_longer_than_the_client_waits_is_waited_out(s3_store: ObjectStore, proxy: Proxy) -> None:
    s3_store.write("a", b"x")
    proxy.refuse(11)
    assert s3_store.read("a") == b"x"
    assert proxy.num_faults_left() == 0


def test_throttling_without_end_becomes_one_line(proxy: Proxy, s3_url: str) -> None:
    store = ObjectStore(s3_url, retry_seconds=2)
    proxy.refuse(1000)
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"while writing a/b \(1 bytes\): SlowDown") as caught:
        store.write("a/b", b"x")
    assert time.monotonic() - begin < 20
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (400, "ExpiredToken"), (301, "PermanentRedirect")],
)
def test_a_refusal_that_stays_is_one_line_at_once(s3_store: ObjectStore, proxy: Proxy, status: int, code: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: s3_store.read("a"),
        lambda: s3_store.write("a", b"x"),
        lambda: s3_store.write_if_absent("a", b"x"),
        lambda: list(s3_store.list()),
        lambda: s3_store.delete("a"),
        lambda: publish(s3_store, "a", LARGE),
    ]
    for use in uses:
        proxy.refuse(1, status=status, code=code)
        begin = time.monotonic()
        with pytest.raises(StoreError, match=code) as caught:
            use()
        assert time.monotonic() - begin < 5
        assert proxy.num_faults_left() == 0
        assert "\n" not in str(caught.value)
        assert s3_store.url in str(caught.value)


def test_a_full_object_store_is_said_to_be_full(proxy: Proxy, s3_url: str) -> None:
    proxy.refuse(1000, status=507, code="XMinioStorageFull")
    with pytest.raises(StoreFullError, match="make room"):
        ObjectStore(s3_url, retry_seconds=1).write("a", b"x")


def test_a_bucket_that_does_not_exist_is_named(proxy: Proxy) -> None:
    store = ObjectStore("s3://nowhere/cache")
    for use in (store.read, lambda path: store.write(path, b""), lambda path: list(store.list(path)), store.delete):
        with pytest.raises(StoreError, match="s3://nowhere/cache: NoSuchBucket .* create the bucket"):
            use("a")


def test_a_server_that_is_not_there_shows_in_seconds(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
        ObjectStore("s3://bucket/cache").read("a")
    assert time.monotonic() - begin < 60


def test_missing_credentials_show_at_once(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(InputError, match="no credentials"):
        ObjectStore("s3://bucket/cache")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(InputError, match="lab"):
        ObjectStore("s3://bucket/cache")


def test_a_profile_gives_the_credentials(
    proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = of-the-lab\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = ObjectStore(s3_url)
    store.write("a", b"x")
    assert store.read("a") == b"x"
    assert "of-the-lab" in proxy.authorizations[-1]


def test_ranges_that_lie_near_are_one_request_and_far_ones_go_together(s3_store: ObjectStore, proxy: Proxy) -> None:
    s3_store.write("shard.tar", LARGE)
    before = proxy.num_requests
    near = [(number * 100_000, 90_000) for number in range(50)]
    assert s3_store.read_ranges("shard.tar", near) == [LARGE[start : start + length] for start, length in near]
    assert proxy.num_requests == before + 1
    proxy.latency_seconds = 0.2
    proxy.most_at_once = 0
    far = [(number * 4_000_000, 1000) for number in range(8)]
    assert s3_store.read_ranges("shard.tar", far) == [LARGE[start : start + length] for start, length in far]
    assert proxy.most_at_once > 1


def test_what_two_claims_on_a_deleted_object_find_is_not_taken_for_ours(s3_store: ObjectStore) -> None:
    assert s3_store.write_if_absent("a", b"first")
    s3_store.delete("a")
    assert s3_store.write_if_absent("a", b"second")
    assert not s3_store.write_if_absent("a", b"first")


def upload_slowly(store: ObjectStore) -> None:
    publish(store, "shards/a.tar", LARGE)


def test_a_writer_killed_in_the_midst_of_an_upload_leaves_nothing_visible(
    s3_store: ObjectStore, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    proxy.latency_seconds = 0.5
    process = multiprocessing.get_context("spawn").Process(target=upload_slowly, args=(s3_store,))
    process.start()
    while not any("partNumber" in path for _, path in proxy.requests):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    proxy.latency_seconds = 0.0
    assert list(s3_store.list()) == []
    assert list(tmp_path.iterdir()) == [], "a local temporary file is left"
    publish(s3_store, "shards/a.tar", LARGE)
    assert s3_store.read("shards/a.tar") == LARGE


UPLOAD = """
import resource, sys
from shared.stores.objects import ObjectStore
store = ObjectStore(sys.argv[1])
part = bytes(range(256)) * 4096
with store.new_file() as new:
    store.write("warm", part)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(400):
        new.file.write(part)
    new.publish("shards/a.tar")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_an_upload_takes_little_memory(s3_store: ObjectStore, s3_server: S3Server) -> None:
    command = [sys.executable, "-c", UPLOAD, s3_store.url]
    environment = {**os.environ, **s3_server.environment}
    mebibytes = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert s3_store.size("shards/a.tar") == 400 * 2**20
    assert mebibytes < 200, "of 400 MiB"


def test_a_fork_after_a_request_is_refused_and_does_not_hang(s3_store: ObjectStore) -> None:
    s3_store.write("a", b"x")
    process = multiprocessing.get_context("fork").Process(target=s3_store.read, args=("a",))
    process.start()
    process.join(20)
    try:
        assert process.exitcode == 1
    finally:
        process.kill()
