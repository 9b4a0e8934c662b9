"""Who may submit jobs: with a token who holds it, without one who reaches the port; and the port is on loopback."""

import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from examples.ray_head import RayHead

JOBS = "/api/jobs/"
AGENT_JOBS = "/api/job_agent/jobs/"
START_SECONDS = 120


def ask(url: str, token: str | None, job: dict[str, str] | None = None) -> tuple[int, str]:
    """Returns status and body of the answer to a request, with ``job`` as what is posted."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=json.dumps(job).encode() if job else None, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def processes_of(process_id: int) -> list[psutil.Process]:
    process = psutil.Process(process_id)
    return [process, *process.children(recursive=True)]


def listening(process_id: int) -> set[tuple[str, int]]:
    """Returns addresses and ports on which a process and all under it listen."""
    found = set()
    for process in processes_of(process_id):
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found |= {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenHead:
    """A Ray head without authentication."""

    job_address: str
    process_id: int


@pytest.fixture(scope="module")
def open_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenHead]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        gcs, dashboard, agent, client = [each.getsockname()[1] for each in sockets]
    tools = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    with (
        tempfile.TemporaryDirectory(prefix="lm-ray-", ignore_cleanup_errors=True) as folder,
        open(tmp_path_factory.mktemp("open") / "ray.log", "wb") as log,
    ):
        command = [
            *(str(tools / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=1", "--object-store-memory=100000000"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            f"--ray-client-server-port={client}",
        ]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for port, path in ((dashboard, "/api/version"), (agent, "/api/local_raylet_healthz")):
                wait_for(f"http://127.0.0.1:{port}{path}", process)
            yield OpenHead(job_address=f"http://127.0.0.1:{dashboard}", process_id=process.pid)
        finally:
            started = processes_of(process.pid) if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(started, timeout=20)
            for each in alive:
                each.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ask(url, None)[0] == 200:
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")


def test_a_job_without_the_token_or_with_another_one_is_refused_on_every_port(ray_head: RayHead):
    token = ray_head.environment["RAY_AUTH_TOKEN"]
    job = {"entrypoint": f"echo {secrets.token_hex(8)}"}
    assert ask(ray_head.job_address + JOBS, None, job)[0] == 401
    assert ask(ray_head.job_address + JOBS, secrets.token_hex(32), job)[0] == 403
    assert ask(ray_head.job_address + JOBS, token[:-1], job)[0] == 403
    refused = []
    for _, port in listening(ray_head.process_id):
        for path in (JOBS, AGENT_JOBS):
            try:
                status, _ = ask(f"http://127.0.0.1:{port}{path}", None, job)
            except (OSError, HTTPException):  # it does not speak HTTP, or listens elsewhere
                continue
            assert status >= 400
            refused.append(status)
    assert refused.count(401) >= 2  # the dashboard's port and the agent's
    assert ask(ray_head.job_address + JOBS, None)[0] == 401
    status, jobs = ask(ray_head.job_address + JOBS, token)
    assert status == 200
    assert job["entrypoint"] not in jobs


def test_a_job_with_the_token_is_accepted_and_runs(ray_head: RayHead, tmp_path: Path):
    token, marker = ray_head.environment["RAY_AUTH_TOKEN"], tmp_path / "ran"
    status, body = ask(ray_head.job_address + JOBS, token, {"entrypoint": f"touch '{marker}'"})
    assert status == 200, body
    name = json.loads(body)["submission_id"]
    deadline = time.monotonic() + START_SECONDS
    while (state := json.loads(ask(f"{ray_head.job_address}{JOBS}{name}", token)[1])["status"]) != "SUCCEEDED":
        assert state in ("PENDING", "RUNNING")
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert marker.exists()


def test_the_head_listens_on_loopback_only(ray_head: RayHead):
    found = listening(ray_head.process_id)
    assert len(found) > 5
    assert not {each for each in found if not is_loopback(each[0])}


@pytest.mark.slow
def test_without_authentication_a_job_needs_no_token_and_the_port_is_on_loopback(open_head: OpenHead):
    status, body = ask(open_head.job_address + JOBS, None, {"entrypoint": "true"})
    assert status == 200, body
    assert json.loads(body)["submission_id"] in ask(open_head.job_address + JOBS, None)[1]
    found = listening(open_head.process_id)
    assert len(found) > 5
    assert not {each for each in found if not is_loopback(each[0])}
