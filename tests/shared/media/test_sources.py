"""The bytes of clips, wherever they lie, and what is said of those that cannot be had."""

import errno
import io
import os
import random
import socket
import tarfile
from pathlib import Path

import pytest

from shared.media import remote as remote_module
from shared.media import sources
from shared.media.clip import Media
from shared.media.ranged_file import RangedFile
from shared.media.refusal import MediaError
from shared.media.sources import media_error, open_source, stamp
from tests.s3 import S3Server
from tests.shared.media.conftest import WebServer
from tests.shared.stores.proxy import Proxy

CONTENT = random.Random(0).randbytes(3_000_000)


def tar_with(path: Path, **members: bytes) -> dict[str, Media]:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return {member.name: Media(url=str(path), offset=member.offset_data, size=member.size) for member in tar}


def reason_of(media: Media) -> tuple[str, bool]:
    with pytest.raises(MediaError) as caught:
        open_source(media)
    return caught.value.reason, caught.value.transient


def check_random_access(file, content: bytes) -> None:
    chance = random.Random(1)
    assert file.seek(0, os.SEEK_END) == len(content)
    assert file.read() == b""
    for _ in range(30):
        start, length = chance.randrange(len(content)), chance.randrange(200_000)
        file.seek(start)
        assert file.read(length) == content[start : start + length]
    file.seek(0)
    assert file.read() == content


def test_a_local_file_is_read_and_sought(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    with open_source(Media(url=str(tmp_path / "a"))) as file:
        check_random_access(file, CONTENT)


def test_a_member_of_a_tar_is_a_file_of_its_own(tmp_path: Path) -> None:
    members = tar_with(tmp_path / "a.tar", before=b"x" * 700, clip=CONTENT, after=b"y" * 900)
    with open_source(members["clip"]) as file:
        check_random_access(file, CONTENT)
        with pytest.raises(ValueError, match="seek"):
            file.seek(-1)


def test_a_member_behind_the_end_of_a_cut_tar_is_truncated(tmp_path: Path) -> None:
    members = tar_with(tmp_path / "a.tar", clip=CONTENT)
    with open(tmp_path / "a.tar", "r+b") as file:
        file.truncate(1_000_000)
    assert reason_of(members["clip"]) == ("truncated", False)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket is short
        server.bind("socket")
        assert reason_of(Media(url=str(tmp_path / "fifo"))) == ("not_a_file", False)
        assert reason_of(Media(url=str(tmp_path))) == ("not_a_file", False)
        assert reason_of(Media(url="/dev/zero")) == ("not_a_file", False)
        assert reason_of(Media(url=str(tmp_path / "socket"))) == ("not_readable", False)
    assert reason_of(Media(url=str(tmp_path / "loop"))) == ("not_readable", False)
    assert reason_of(Media(url=str(tmp_path / "none"))) == ("missing", False)
    assert reason_of(Media(url=str(tmp_path / "a\x00b"))) == ("bad_path", False)
    assert reason_of(Media(url=str(tmp_path / ("a" * 300)))) == ("not_readable", False)


def test_errors_of_a_network_file_system_may_pass() -> None:
    assert media_error("a", OSError(errno.EIO, "I/O error")).transient
    assert media_error("a", OSError(errno.ESTALE, "stale")).reason == "not_reachable"
    assert not media_error("a", PermissionError(errno.EACCES, "denied")).transient


def test_a_stamp_changes_with_the_file_and_differs_between_members(tmp_path: Path) -> None:
    members = tar_with(tmp_path / "a.tar", one=b"1" * 10, two=b"2" * 10)
    assert stamp(members["one"]) != stamp(members["two"])
    before = stamp(members["one"])
    assert stamp(members["one"]) == before
    os.utime(tmp_path / "a.tar", (1, 1))
    assert stamp(members["one"]) != before
    with pytest.raises(MediaError, match="missing"):
        stamp(Media(url=str(tmp_path / "none")))


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("whole_bytes", [10_000_000, 100_000])
def test_a_web_server_with_and_without_ranges_gives_the_same(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, has_ranges: bool, whole_bytes: int
) -> None:
    monkeypatch.setattr(sources, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(web, "has_ranges", has_ranges)
    web.files["/a/clip.mp4"] = CONTENT
    with open_source(Media(url=f"{web.url}/a/clip.mp4")) as file:
        check_random_access(file, CONTENT)
    with open_source(Media(url=f"{web.url}/a/clip.mp4", offset=1000, size=1_500_000)) as file:
        check_random_access(file, CONTENT[1000:1_501_000])
    assert stamp(Media(url=f"{web.url}/a/clip.mp4")).startswith("3000000-")


def test_queries_and_escapes_reach_the_server_as_they_are(web: WebServer) -> None:
    web.files["/a%20b/c%2Fd.mp4?sig=x%3D1&e=2"] = b"clip"
    with open_source(Media(url=f"{web.url}/a%20b/c%2Fd.mp4?sig=x%3D1&e=2")) as file:
        assert file.read() == b"clip"


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "missing"), (410, "missing"), (403, "not_readable"), (401, "not_readable")]
)
def test_a_refusal_that_stays_is_not_tried_again(web: WebServer, status: int, reason: str) -> None:
    web.statuses += [status]
    assert reason_of(Media(url=f"{web.url}/a.mp4")) == (reason, False)
    assert len(web.requests) == 1


def test_throttling_is_waited_for(web: WebServer) -> None:
    web.files["/a.mp4"] = b"clip"
    web.statuses += [503, 429, 503]
    with open_source(Media(url=f"{web.url}/a.mp4")) as file:
        assert file.read() == b"clip"
    assert len(web.requests) == 4


def test_a_server_that_stays_away_is_not_the_clips_fault(monkeypatch: pytest.MonkeyPatch, web: WebServer) -> None:
    monkeypatch.setattr(remote_module, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(remote_module, "_CLIENT_RETRY_SECONDS", 0.1)
    web.statuses += [503] * 1000
    assert reason_of(Media(url=f"{web.url}/away.mp4")) == ("not_reachable", True)


def test_objects_are_read_by_ranges_through_throttling_and_lost_connections(
    proxy: Proxy, s3_server: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "WHOLE_BYTES", 1_000_000)
    s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/a b/ü.mp4", Body=CONTENT)
    media = Media(url=f"{s3_server.url}/{prefix}/a b/ü.mp4")
    before = stamp(media)
    proxy.refuse(3)
    proxy.refuse(2, status=429, code="TooManyRequests")
    proxy.lose_answers(1)
    proxy.cut_answers(2)
    with open_source(media) as file:
        check_random_access(file, CONTENT)
    assert proxy.num_faults_left() == 0
    assert stamp(media) == before
    s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/a b/ü.mp4", Body=CONTENT[::-1])
    assert stamp(media) != before


def test_objects_that_are_missing_or_forbidden_are_told_apart(proxy: Proxy, s3_server: S3Server, prefix: str) -> None:
    assert reason_of(Media(url=f"{s3_server.url}/{prefix}/none.mp4")) == ("missing", False)
    proxy.refuse(1, status=403, code="AccessDenied")
    assert reason_of(Media(url=f"{s3_server.url}/{prefix}/none.mp4")) == ("not_readable", False)
    proxy.refuse(1, status=400, code="ExpiredToken")
    assert reason_of(Media(url=f"{s3_server.url}/{prefix}/none.mp4")) == ("not_reachable", True)


def test_an_empty_object_is_an_empty_file(proxy: Proxy, s3_server: S3Server, prefix: str) -> None:
    s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/empty", Body=b"")
    with open_source(Media(url=f"{s3_server.url}/{prefix}/empty")) as file:
        assert file.read() == b""
    assert stamp(Media(url=f"{s3_server.url}/{prefix}/empty")).startswith("0-")


def test_missing_credentials_are_not_the_clips_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reason_of(Media(url="s3://bucket/a.mp4")) == ("not_reachable", True)


def test_blocks_are_read_ahead_and_kept() -> None:
    asked: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        asked.append((start, end))
        return CONTENT[start:end]

    file = RangedFile(read, offset=100, size=1000, block_bytes=100, blocks_ahead=4)
    assert file.read(50) == CONTENT[100:150]
    file.seek(950)
    assert file.read(100) == CONTENT[1050:1100]
    file.seek(20)
    assert file.read(10) == CONTENT[120:130]
    file.seek(100)
    assert io.BufferedReader(file).read(450) == CONTENT[200:650]
    assert asked == [(100, 500), (1000, 1100), (500, 900)]


def test_a_forked_child_is_told_instead_of_waiting_for_ever(web: WebServer) -> None:
    web.files["/a.mp4"] = b"clip"
    open_source(Media(url=f"{web.url}/a.mp4")).close()
    child = os.fork()
    if child == 0:
        try:
            open_source(Media(url=f"{web.url}/a.mp4"))
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
