"""kill -9 of a worker, of the driver and of the head, at every phase of a commit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from examples.ray_head import RayHead
from shared.cache.dataset import Cache
from tests.preprocess.conftest import ROOT, demo_options
from tests.preprocess.test_job import shards, table

PHASES = ("before the shard is durable", "after the shard, before its fragment", "after the fragment")
_SECONDS = 300


@dataclass(frozen=True)
class Pauses:
    """Where workers stop; see ``paused/sitecustomize.py``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs so that its workers stop: it reaches them as the environment of a submitted job does."""
        variables = {"PYTHONPATH": str(Path(__file__).parent / "paused"), "LATENTMILL_TEST_PAUSES": str(self.folder)}
        return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}})}

    def at(self, phase: str) -> None:
        """Wants the first worker that comes to a phase to stop there."""
        (self.folder / "phase").write_text(phase)

    def reached(self, job: subprocess.Popen[str]) -> int:
        """Waits until a worker has stopped; returns its process."""
        deadline = time.monotonic() + _SECONDS
        while not ((self.folder / "reached").exists() and (self.folder / "reached").read_text()):
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.05)
        return int((self.folder / "reached").read_text())

    def over(self) -> None:
        """Lets all go on."""
        (self.folder / "phase").unlink()

    def begun(self) -> list[tuple[str, int]]:
        """Returns which shards began to be encoded, and when."""
        lines = (self.folder / "begun").read_text().splitlines()
        return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.fixture
def pauses(tmp_path: Path) -> Pauses:
    (tmp_path / "pauses").mkdir()
    return Pauses(tmp_path / "pauses")


def start(head: RayHead, pauses: Pauses, clips: Path, cache: Path) -> subprocess.Popen[str]:
    """Starts a job of one worker."""
    command = [sys.executable, "-m", "preprocess", *map(str, demo_options(clips, cache)), "--workers", "1"]
    environment = head.environment | pauses.environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(job: subprocess.Popen[str]) -> dict[str, str]:
    """Waits until a job has ended well; returns its closing table."""
    output, errors = job.communicate(timeout=_SECONDS)
    assert job.returncode == 0, errors
    return table(subprocess.CompletedProcess(job.args, 0, output, errors))


def check(cache: Path, demo_cache: Path, pauses: Pauses) -> None:
    """Compares with an undisturbed run, and that nothing was encoded after it had been committed."""
    assert shards(cache) == shards(demo_cache)
    assert sorted(path.name for path in cache.glob("index/*")) == sorted(p.name for p in demo_cache.glob("index/*"))
    assert len(Cache.open(cache).read_index()) == 12
    committed = {path.stem: path.stat().st_mtime_ns for path in cache.glob("index/*.parquet")}
    assert [shard for shard, when in pauses.begun() if when > committed[shard]] == []


def num_committed(cache: Path) -> int:
    """Returns the samples that are in the index."""
    return len(Cache.open(cache).read_index())


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[pytest.mark.slow] * (phase != PHASES[1])) for phase in PHASES]
)
def test_a_worker_killed_in_a_commit_costs_nothing_that_was_committed(
    demo_cache: Path, ray_head: RayHead, clips_folder: Path, tmp_path: Path, pauses: Pauses, phase: str
) -> None:
    cache = tmp_path / "cache"
    pauses.at(phase)
    job = start(ray_head, pauses, clips_folder, cache)
    worker = pauses.reached(job)
    os.kill(worker, signal.SIGKILL)
    pauses.over()
    assert finish(job)["samples encoded"] == "12"
    check(cache, demo_cache, pauses)
    keys = [shard for shard, _ in pauses.begun()]
    assert len(keys) - len(set(keys)) >= (phase != PHASES[2]), "what was not committed is encoded again"


def kill_driver(job: subprocess.Popen[str], head: RayHead) -> None:
    """Kills the driver."""
    job.kill()


def kill_head(job: subprocess.Popen[str], head: RayHead) -> None:
    """Kills all of Ray's processes at once, as if their machine were gone; the driver was on it."""
    started = [*psutil.Process(head.process_id).children(recursive=True), psutil.Process(head.process_id)]
    for process in started:
        with suppress(psutil.NoSuchProcess):  # it may have ended with another
            process.kill()
    psutil.wait_procs(started, timeout=20)
    job.kill()


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kill", [kill_driver, kill_head])
def test_a_driver_or_a_head_killed_in_a_commit_is_submitted_again_and_encodes_only_what_is_missing(
    demo_cache: Path,
    clips_folder: Path,
    tmp_path: Path,
    pauses: Pauses,
    phase: str,
    kill: Callable[[subprocess.Popen[str], RayHead], None],
) -> None:
    cache = tmp_path / "cache"
    pauses.at(phase)
    with RayHead(tmp_path / "ray.log", num_cpus=2) as head:
        job = start(head, pauses, clips_folder, cache)
        worker = pauses.reached(job)
        kill(job, head)
        job.communicate()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker):  # it went with its driver, or with its head
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pauses.over()
    before = num_committed(cache)
    assert before >= (2 if phase == PHASES[2] else 0)
    with RayHead(tmp_path / "again.log", num_cpus=2) as head:
        closing = finish(start(head, pauses, clips_folder, cache))
    assert closing["samples already there"] == str(before)
    assert closing["samples encoded"] == str(12 - before)
    check(cache, demo_cache, pauses)
