"""An HTTP proxy before a real server, which delays, refuses and loses what it is told to."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "server", "date"}


@dataclass(kw_only=True, slots=True)
class Fault:
    """What happens to requests of one kind, so many times."""

    times: int
    kind: Literal["refuse", "lose answer", "cut answer", "reset"]
    """refuse: an error in place of an answer. lose answer: the server does it, the connection ends without an answer.
    cut answer: it ends in the middle of the answer's body. reset: it ends before the server sees the request."""
    method: str
    part_of_path: str
    """Of the path with its query; "" is in all of them."""
    status: int = 503
    code: str = "SlowDown"


class Proxy:
    """A proxy that is running; use :func:`running_proxy`."""

    def __init__(self, upstream: str, latency_seconds: float) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None, upstream
        assert parts.port is not None, upstream
        self.host, self.port = parts.hostname, parts.port
        self.latency_seconds = latency_seconds
        """Waited before each request is passed on; may be changed at any time."""
        self.requests: list[tuple[str, str]] = []
        """Method and path with query of each request so far."""
        self.most_at_once = 0
        """Requests that waited at the same time, at most; may be set back."""
        self._waiting = 0
        self.authorizations: list[str] = []
        """Each request's Authorization header."""
        self.endpoint = ""
        self.lock = threading.Lock()
        self.claims = threading.Lock()
        self._faults: list[Fault] = []

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def num_faults_left(self) -> int:
        """Returns how many times faults are still to happen."""
        return sum(fault.times for fault in self._faults)

    def refuse(
        self, times: int, *, status: int = 503, code: str = "SlowDown", method: str = "", part_of_path: str = ""
    ) -> None:
        """Refuses the next requests."""
        self._add(Fault(kind="refuse", times=times, status=status, code=code, method=method, part_of_path=part_of_path))

    def lose_answers(self, times: int, *, method: str = "", part_of_path: str = "") -> None:
        """Closes the connection after the server did what the next requests ask for."""
        self._add(Fault(kind="lose answer", times=times, method=method, part_of_path=part_of_path))

    def cut_answers(self, times: int, *, method: str = "", part_of_path: str = "") -> None:
        """Closes the connection in the middle of the next answers."""
        self._add(Fault(kind="cut answer", times=times, method=method, part_of_path=part_of_path))

    def reset(self, times: int, *, method: str = "", part_of_path: str = "") -> None:
        """Closes the connection before the server sees the next requests."""
        self._add(Fault(kind="reset", times=times, method=method, part_of_path=part_of_path))

    def _add(self, fault: Fault) -> None:
        with self.lock:
            self._faults.append(fault)

    def wait(self) -> None:
        """Holds a request back for the latency."""
        with self.lock:
            self._waiting += 1
            self.most_at_once = max(self.most_at_once, self._waiting)
        time.sleep(self.latency_seconds)
        with self.lock:
            self._waiting -= 1

    def fault_of(self, method: str, path: str) -> Fault | None:
        """Counts a request and returns what is to happen to it."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", method) and fault.part_of_path in path:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: no waiting for more to send.

    def log_message(self, *args: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        return True

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.authorizations.append(self.headers.get("Authorization", ""))
        fault = self.proxy.fault_of(self.command, self.path)
        self.proxy.wait()
        if fault is not None and fault.kind == "refuse":
            error = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>By the proxy.</Message></Error>"
            self._answer(fault.status, [("Content-Type", "application/xml")], error.encode())
            return
        if fault is not None and fault.kind == "reset":
            self.close_connection = True
            return
        status, headers, answer = self._ask(body)
        if fault is not None:
            self.close_connection = True
            if fault.kind == "lose answer":
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[: len(answer) // 2])
            return
        self._answer(status, headers, answer)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.headers.get("If-None-Match") == "*":
            with self.proxy.claims:  # S3 decides these in one step; moto looks first and stores then.
                return self._exchange(body)
        return self._exchange(body)

    def _exchange(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(self.proxy.host, self.proxy.port)
        try:
            self.upstream.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
            response = self.upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            self.upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP and name.lower() != "content-length":
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", lengths[0] if is_head and lengths else str(len(body)))
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def handle(self) -> None:
        with suppress(ConnectionError):  # The client went away.
            super().handle()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on  # noqa: N815 - names that http.server looks up


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def running_proxy(upstream: str, *, latency_seconds: float = 0.0) -> Iterator[Proxy]:
    """Runs a proxy before ``upstream``, such as ``http://127.0.0.1:4567``, in threads of this process."""
    proxy = Proxy(upstream, latency_seconds)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
