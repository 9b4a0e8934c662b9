"""Files of Hugging Face repositories, from a server that answers as the hub does."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler

import pytest
from huggingface_hub.errors import HfHubHTTPError

from shared.media import hub
from shared.media.clip import Media
from shared.media.manifest import read_manifest
from shared.media.refusal import MediaError
from shared.media.sources import open_source, stamp
from tests.local_server import serving

FILES = {"d/a.mp4": b"a clip of the hub " * 100, "d/a.txt": b"its text"}
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    statuses: list[int]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "/resolve/" in self.path and self.statuses:
            self._send(self.statuses.pop(), b"")
        elif "/tree/" in self.path:
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": f"id of {name}"}
                for name, content in FILES.items()
            ]
            self._send(200, json.dumps(found).encode())
        elif match := re.fullmatch(r"/datasets/owner/name/resolve/main/(.*)", self.path):
            bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert bounds
            self._send(206, FILES[match[1]][int(bounds[1]) : int(bounds[2]) + 1])
        elif self.path.startswith("/api/datasets/owner/name"):
            self._send(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        else:
            self._send(404, b"{}")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(body)


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Answers of the next requests for content; the hub runs meanwhile."""
    found: list[int] = []
    with serving(type("Handler", (Hub,), {"statuses": found})) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield found


def test_clips_of_a_repository_are_read_as_files(statuses: list[int]) -> None:
    manifest = read_manifest("hf://datasets/owner/name/d")
    (clip,) = manifest.clips
    assert (clip.source, clip.captions) == ("a.mp4", ("its text",))
    with open_source(clip.media) as file:
        assert file.read() == FILES["d/a.mp4"]
    with open_source(Media(url=clip.media.url, offset=2, size=4)) as file:
        assert file.read() == b"clip"
    assert stamp(clip.media) == "1800-id of d/a.mp4"
    with pytest.raises(MediaError, match="missing"):
        stamp(Media(url="hf://datasets/owner/name/d/none.mp4"))


def test_a_hub_that_throttles_is_not_the_clips_fault(statuses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", lambda _: None)  # of the library, between its own attempts
    media = Media(url="hf://datasets/owner/name/d/a.mp4")
    statuses += [403]
    with pytest.raises(MediaError, match="not_readable") as caught:
        open_source(media)
    assert not caught.value.transient
    statuses += [503] * 100
    with pytest.raises(MediaError, match="not_reachable") as caught:
        open_source(media)
    assert caught.value.transient


def test_a_hub_that_refuses_connections_is_not_the_clips_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library's HTTP client raises then is no OSError."""

    class Unreachable:
        def info(self, url: str) -> object:
            raise ConnectError("connection refused")

    (transport_error,) = (base for base in HfHubHTTPError.__bases__ if base is not OSError)

    class ConnectError(transport_error):  # type: ignore[valid-type, misc]
        pass

    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(hub, "_files", Unreachable)
    with pytest.raises(MediaError, match="not_reachable: .*connection refused") as caught:
        stamp(Media(url="hf://datasets/owner/name/a.mp4"))
    assert caught.value.transient
