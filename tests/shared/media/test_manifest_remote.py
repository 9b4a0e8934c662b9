"""Manifests and clips behind URLs."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import InputError
from shared.media.manifest import Manifest, read_manifest
from shared.media.sources import open_source
from shared.media.urls import join, locate, parent_of
from tests.s3 import S3Server
from tests.shared.media.conftest import WebServer
from tests.shared.stores.proxy import Proxy


def contents(manifest: Manifest) -> list[bytes]:
    found = []
    for clip in manifest.clips:
        with open_source(clip.media) as file:
            found.append(file.read())
    return found


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
    return buffer.getvalue()


def test_a_manifest_on_s3_names_objects_beside_it(proxy: Proxy, s3_server: S3Server, prefix: str) -> None:
    client, root = s3_server.client(), f"{s3_server.url}/{prefix}"
    buffer = io.BytesIO()
    paths = ["a.mp4", "./sub/../b/c.mp4", f"{root}/d.mp4", "../../../e.mp4"]
    pq.write_table(pa.table({"path": paths, "text": ["t"] * 4}), buffer)
    client.put_object(Bucket="bucket", Key=f"{prefix}/m.parquet", Body=buffer.getvalue())
    for name in ("a", "b/c", "d"):
        client.put_object(Bucket="bucket", Key=f"{prefix}/{name}.mp4", Body=name.encode())
    proxy.refuse(2)
    manifest = read_manifest(f"{root}/m.parquet")
    assert manifest.root == root
    assert [clip.source for clip in manifest.clips] == paths[:3]
    assert [clip.media.url for clip in manifest.clips] == [f"{root}/{name}.mp4" for name in ("a", "b/c", "d")]
    assert contents(manifest) == [b"a", b"b/c", b"d"]
    assert [(row.source, row.reason) for row in manifest.refused] == [("../../../e.mp4", "bad_path")]


def test_shards_on_s3_are_read_by_their_headers_alone(proxy: Proxy, s3_server: S3Server, prefix: str) -> None:
    body = b"v" * 3_000_000
    for number in range(3):
        members = {f"{key}{number}.{ending}": text for key in "ab" for ending, text in (("mp4", body), ("txt", b"t"))}
        s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/{number}.tar", Body=tar_bytes(members))
    before = proxy.num_requests
    manifest = read_manifest(f"{s3_server.url}/{prefix}/{{0..2}}.tar")
    assert [clip.source for clip in manifest.clips] == [f"{n}.tar/{key}{n}.mp4" for n in range(3) for key in "ab"]
    assert proxy.num_requests - before <= 3 * 5
    assert manifest.root == f"{s3_server.url}/{prefix}"
    assert [clip.source for clip in read_manifest(f"{s3_server.url}/{prefix}/*.tar").clips] == [
        clip.source for clip in manifest.clips
    ]
    assert contents(manifest) == [body] * 6


def test_a_prefix_on_s3_is_a_folder_of_clips(proxy: Proxy, s3_server: S3Server, prefix: str) -> None:
    for name, body in (
        ("b.mp4", "clip b"),
        ("b.txt", "text b"),
        ("a/a.jpg", "clip a"),
        ("a/a.txt", "text a"),
        ("c.mp4", ""),
    ):
        s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/set/{name}", Body=body.encode())
    s3_server.client().put_object(Bucket="bucket", Key=f"{prefix}/set2/x.mp4", Body=b"of another set")
    manifest = read_manifest(f"{s3_server.url}/{prefix}/set")
    assert [(clip.source, clip.captions) for clip in manifest.clips] == [
        ("a/a.jpg", ("text a",)),
        ("b.mp4", ("text b",)),
    ]
    assert contents(manifest) == [b"clip a", b"clip b"]
    assert [row.source for row in manifest.refused] == ["c.mp4"]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_manifests_and_shards_are_read_from_a_web_server(web: WebServer, has_ranges: bool) -> None:
    web.has_ranges = has_ranges
    web.files["/m.csv?key=1"] = b"path,text\nclips/a.mp4,one\n/no/such/file.mp4,two\n"
    web.files["/clips/a.mp4"] = b"clip"
    web.files["/s.tar"] = tar_bytes({"a.mp4": b"member", "a.txt": b"t"})
    manifest = read_manifest(f"{web.url}/m.csv?key=1")
    assert [clip.media.url for clip in manifest.clips] == [f"{web.url}/clips/a.mp4", "/no/such/file.mp4"]
    assert contents(read_manifest(f"{web.url}/s.tar")) == [b"member"]
    with pytest.raises(InputError, match="web servers list no files"):
        read_manifest(f"{web.url}/folder")
    with pytest.raises(InputError, match="missing: no object"):
        read_manifest(f"{web.url}/none.jsonl")


@pytest.mark.parametrize("url", ["ftp://h/a.csv", "pipe://cat a.csv", "smb://h/a", "simplecache://x", "memory://a.csv"])
def test_other_protocols_are_refused_by_name(tmp_path: Path, url: str) -> None:
    scheme = url.partition(":")[0]
    with pytest.raises(InputError, match=f"protocol {scheme}:// is not read: expected a local path, s3://"):
        read_manifest(url)
    (tmp_path / "m.csv").write_text(f"path,text\n{url},one\na.mp4,two\n")
    manifest = read_manifest(tmp_path / "m.csv")
    assert [(row.source, row.reason) for row in manifest.refused] == [(url, "bad_path")]
    assert f"protocol {scheme}:// is not read" in manifest.refused[0].detail


def test_what_looks_like_a_command_is_the_name_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_manifest(f"pipe:touch {tmp_path}/run.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.csv").write_text("path,text\npipe:0,one\nconcat:/etc/passwd|a,two\n")
    assert [clip.media.url for clip in read_manifest(tmp_path / "m.csv").clips] == [
        f"{tmp_path}/pipe:0",
        f"{tmp_path}/concat:/etc/passwd|a",
    ]


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    (tmp_path / "a b.csv").write_text(f"path,text\nfile://{tmp_path}/c%20d.mp4,one\n")
    manifest = read_manifest(f"file://{tmp_path}/a%20b.csv")
    assert manifest.clips[0].media.url == f"{tmp_path}/c d.mp4"
    assert manifest.root == str(tmp_path)


def test_urls_are_joined_and_taken_apart() -> None:
    assert join("/data", "a/../b.mp4") == "/data/a/../b.mp4"
    assert join("s3://bucket/x", "S3://other/key//y") == "s3://other/key//y"
    assert join("s3://bucket", "./a//b") == "s3://bucket/a/b"
    assert parent_of("s3://bucket/m.csv") == "s3://bucket"
    assert parent_of("https://host/a/m.csv?x=/y/z") == "https://host/a"
    assert parent_of("/data/m.csv") == "/data"
    assert locate("HTTPS://host/a") == "https://host/a"
    with pytest.raises(InputError, match="names no file of this machine"):
        locate("file://host/a")
