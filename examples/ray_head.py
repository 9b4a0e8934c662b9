"""A Ray head of one's own on loopback, with a token of its own, beside whatever Ray runs on the machine already."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

_START_SECONDS = 120
_STOP_SECONDS = 20


class RayHead:
    """A Ray head node that lives as long as the ``with`` block, and listens on 127.0.0.1 only.

    Without a token whoever reaches the job port may run code; so the head gets a random one, known to the processes
    that are started with :attr:`environment`. Nothing is written to the user's home.

    Args:
        log: Where Ray's own output goes.
        num_cpus: What the head offers; all of the machine's by default.
    """

    def __init__(self, log: Path, num_cpus: int | None = None) -> None:
        self._log, self._num_cpus = log, num_cpus

    def __enter__(self) -> "RayHead":
        gcs, dashboard, agent, client = _free_ports(4)
        self.address = f"127.0.0.1:{gcs}"
        self.job_address = f"http://127.0.0.1:{dashboard}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        tools = Path(sys.executable).parent  # where `ray` is, and the `python` that a job names
        self.environment = inherited | {
            "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes 127.0.0.1 for the machine's own address
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "no_proxy": "127.0.0.1,localhost",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        # Short: the sockets inside must stay under 107 characters.
        self._folder = tempfile.mkdtemp(prefix="lm-ray-")
        command = [
            *(str(tools / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={self._folder}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", "--object-store-memory=500000000"),
            *([f"--num-cpus={self._num_cpus}"] if self._num_cpus is not None else []),
        ]
        start_environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with ExitStack() as on_failure:
            on_failure.callback(shutil.rmtree, self._folder, ignore_errors=True)
            with open(self._log, "wb") as log:
                # Its own session: Ctrl-C is for us; we then end the head in order.
                self._process = subprocess.Popen(
                    command, env=start_environment, stdout=log, stderr=log, start_new_session=True
                )
            on_failure.callback(self._stop)
            self._wait_for(f"http://127.0.0.1:{dashboard}/api/version")
            self._wait_for(f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
            self._on_exit = on_failure.pop_all()
        return self

    @property
    def process_id(self) -> int:
        """Of the process under which all of Ray's run."""
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._on_exit.close()

    def _wait_for(self, url: str) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                direct.open(url, timeout=2)
                return
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):  # it answers; it wants the token
                    return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.3)
        raise RuntimeError(f"Ray did not start within {_START_SECONDS} s; its output is in {self._log}")

    def _stop(self) -> None:
        """Ends the head and every process that it started, and none else."""
        try:
            started = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            started = []
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(started, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)


def _free_ports(count: int) -> list[int]:
    """Returns ports of 127.0.0.1 on which nobody listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
