"""What strangers wrote: nothing but the file itself is read, and little of it claims much memory for nothing."""

import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.media import container
from shared.media.clip import Media
from shared.media.probe import probe
from shared.media.refusal import MediaError
from tests.shared.media.made_clips import grey, media_of, write_clip


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A local port that nobody should connect to."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        yield listening


def refused_for(media: Media) -> str:
    """Returns the reason of a refusal."""
    with pytest.raises(MediaError) as refused:
        probe(media)
    assert not refused.value.transient
    return refused.value.reason


def _redirection(target: str) -> bytes:
    """Returns a QuickTime movie that is only a reference to another."""
    content = b"\0\0\0\0url " + struct.pack(">I", len(target) + 1) + target.encode() + b"\0"
    for kind in (b"rdrf", b"rmda", b"rmra", b"moov"):
        content = struct.pack(">I4s", len(content) + 8, kind) + content
    return struct.pack(">I4s", 16, b"ftyp") + b"qt  \0\0\0\0" + content


def playlists(target: str, port: int) -> dict[str, bytes]:
    """Returns files that name another: ``target``, a path or a URL."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode(),
        "concat": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
            f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>'
        ).encode(),
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n".encode(),
        "svg": f'<svg xmlns:xlink="http://www.w3.org/1999/xlink"><image xlink:href="{target}"/></svg>'.encode(),
        "redirection": _redirection(target),
    }


@pytest.mark.parametrize("kind", list(playlists("", 1)))
@pytest.mark.parametrize("where", ["file", "network"])
@pytest.mark.parametrize("name", ["clip.mp4", "playlist.m3u8", "frame%03d.png"])
def test_a_playlist_reads_no_file_and_reaches_no_host(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, kind: str, where: str, name: str
) -> None:
    """As a file of its own, as a member of a tar, and through a file object, as objects are read."""
    port = listener.getsockname()[1]
    secret = write_clip(tmp_path / "secret.mkv", [grey(number) for number in range(4)])
    content = playlists(str(secret) if where == "file" else f"http://127.0.0.1:{port}/secret.mkv", port)[kind]
    path, tar = tmp_path / name, tmp_path / "shard.tar"
    path.write_bytes(content)
    tar.write_bytes(bytes(512) + content)
    expected = {"not_a_video", "no_video_stream"} if kind == "redirection" else {"not_a_video"}
    assert refused_for(media_of(path)) in expected
    assert refused_for(Media(url=str(tar), offset=512, size=len(content))) in expected
    monkeypatch.setattr(container, "is_local", lambda media: False)
    assert refused_for(media_of(path)) in expected
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_member_of_a_tar_sees_nothing_of_its_neighbours(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "a.mkv", [grey(number) for number in range(4)]).read_bytes()
    tar = tmp_path / "shard.tar"
    tar.write_bytes(b"junk" * 128 + content)
    assert refused_for(Media(url=str(tar), offset=0, size=512)) == "not_a_video"
    assert refused_for(Media(url=str(tar), offset=512, size=len(content) + 1)) == "truncated"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [12_000, 16_385, 65_535])
def test_an_image_that_claims_to_be_huge_is_refused(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + pixels + _chunk(b"IEND", b""))
    assert refused_for(media_of(path)) == "too_large"


def test_a_text_in_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    text = _chunk(b"zTXt", b"title\0\0" + zlib.compress(bytes(50_000_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + text + _chunk(b"IEND", b""))
    assert refused_for(media_of(path)) == "not_decodable"


@pytest.mark.parametrize(("side", "reason"), [(0x3001, "too_large"), (0xFFFF, "not_decodable")])
def test_a_video_that_claims_to_be_huge_is_refused(tmp_path: Path, side: int, reason: str) -> None:
    """FFV1 has its size from the container: 300x280 becomes 12289x12289; 65535x65535 not even FFmpeg believes."""
    path = write_clip(tmp_path / "bomb.mkv", [grey(0, 280, 300)] * 2, codec="ffv1", options={})
    content = path.read_bytes()
    size, claimed = b"\xb0\x82\x01\x2c\xba\x82\x01\x18", struct.pack(">2sH2sH", b"\xb0\x82", side, b"\xba\x82", side)
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, claimed))
    assert refused_for(media_of(path)) == reason
