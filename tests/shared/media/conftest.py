"""Servers that the tests of this folder read from."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

import pytest

from tests.local_server import serving


@dataclass(kw_only=True)
class WebServer:
    """Files behind HTTP; use the fixture."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By path with query."""
    has_ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    """Answers of the next requests, before files are sent again."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request so far."""
    url: str = ""


@pytest.fixture
def web() -> Iterator[WebServer]:
    with _running(WebServer()) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix of the test's own in the bucket."""
    return secrets.token_hex(4)


@contextmanager
def _running(web_server: WebServer) -> Iterator[WebServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            web_server.requests.append((self.path, asked))
            content = web_server.files.get(self.path)
            if web_server.statuses:
                self._send(web_server.statuses.pop(0), b"")
            elif content is None:
                self._send(404, b"")
            elif (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)) and web_server.has_ranges:
                start, end = int(match[1]), min(int(match[2]) + 1, len(content))
                self._send(206, content[start:end], f"bytes {start}-{end - 1}/{len(content)}")
            else:
                self._send(200, content)

        def _send(self, status: int, body: bytes, content_range: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            with suppress(ConnectionError):  # The client needs no more.
                self.wfile.write(body)

    with serving(Handler) as web_server.url:
        yield web_server
