"""Workers that hang, that cannot be placed, and nodes on which they die again and again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from examples.ray_head import RayHead
from shared.cache.dataset import Cache
from tests.preprocess.conftest import ROOT, Command, demo_options
from tests.preprocess.test_job import shards

PIPED: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
_QUIET_SECONDS = 60.0
"""Longer than a node rests between deaths, and than a worker takes to start."""


def events(cache: Path) -> list[dict[str, object]]:
    """Returns the events of the newest run."""
    newest = max((cache / "runs").iterdir())
    return [json.loads(line) for part in sorted(newest.glob("events-*")) for line in part.read_text().splitlines()]


def encoders_below(process_id: int) -> list[psutil.Process]:
    """Returns the encoding actors among the processes that a process started."""
    found = []
    for process in psutil.Process(process_id).children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_workers_that_cannot_be_placed_end_the_job_with_what_there_is_and_what_was_asked(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(demo_cache / "probes", tmp_path / "cache/probes")
    options = demo_options(clips_folder, tmp_path / "cache")
    result = preprocess(*options, "--device", "cuda", "--resource-timeout", 3)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "no worker could be placed for 3 s: it asks for 1 GPU, and the cluster has 0 GPUs, 0 free and 2 CPUs" in line
    assert "--resource-timeout" in line


@pytest.mark.slow
def test_a_cluster_without_a_cpu_for_decoding_ends_the_job_with_a_line(
    demo_cache: Path, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(demo_cache / "probes", cache / "probes")
    limits = ["--resource-timeout", 6, "--decode-timeout", 2]
    with RayHead(tmp_path / "ray.log", num_cpus=0) as head:
        job = subprocess.run(
            [sys.executable, "-m", "preprocess", *map(str, [*demo_options(clips_folder, cache), *limits])],
            cwd=ROOT,
            env=head.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert job.returncode == 2, job.stderr
    (line,) = [line for line in job.stderr.splitlines() if line.startswith("error:")]
    assert "and the cluster has 0 GPUs, 0 free and 0 CPUs, 0 free, on 1 node:" in line


def test_a_worker_that_hangs_is_ended_and_its_shards_go_to_another(
    demo_cache: Path, ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = [*demo_options(clips_folder, cache), "--worker-timeout", 10]
    command = [sys.executable, "-m", "preprocess", *map(str, options)]
    with subprocess.Popen(command, cwd=ROOT, env=ray_head.environment, stdout=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 240
        while not list(cache.glob("index/*.parquet")):
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.02)
        (hung,) = encoders_below(ray_head.process_id)
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            output, _ = job.communicate(timeout=240)
        finally:
            if hung.is_running():
                hung.kill()
    assert job.returncode == 0, output
    assert shards(cache) == shards(demo_cache)
    lost = [event for event in events(cache) if event["event"] == "worker_lost"]
    assert ["no answer" in str(event["cause"]) for event in lost] == [True]


@contextmanager
def killer_of_encoders(node: int) -> Iterator[list[int]]:
    """Kills every encoding actor of a node, again and again, while it loads; gives those that it killed."""
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.5):
            for process in encoders_below(node):
                if "tokenizers" in "".join(mapped.path for mapped in process.memory_maps()):
                    killed.append(process.pid)
                    process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_whose_workers_die_is_kept_from_work_and_the_others_go_on(
    demo_cache: Path, clips_folder: Path, tmp_path: Path
) -> None:
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    try:
        bad, _ = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        raylet = next(process for name, process in bad.live_processes() if name == "raylet")
        cache = tmp_path / "cache"
        options = [*demo_options(clips_folder, cache), "--address", cluster.address, "--shard-samples", 1]
        options += [
            "--windows-per-clip",
            30,
            "--flip",
            "--buckets",
            *(f"{n}x{m}x{m}" for n in (4, 8) for m in (32, 48, 64)),
        ]
        command = [sys.executable, "-m", "preprocess", *map(str, options)]
        with killer_of_encoders(raylet.pid) as killed, subprocess.Popen(command, cwd=ROOT, **PIPED) as job:
            while len(killed) < 3:
                assert job.poll() is None
                time.sleep(0.2)
            last, seen = time.monotonic(), len(killed)
            while time.monotonic() - last < _QUIET_SECONDS and job.poll() is None:
                time.sleep(0.2)
                if len(killed) > seen:
                    last, seen = time.monotonic(), len(killed)
            job.send_signal(signal.SIGTERM)
            output, errors = job.communicate(timeout=120)
        assert job.returncode in (0, 3), errors
        (excluded,) = [event for event in events(cache) if event["event"] == "node_excluded"]
        assert bad.node_id[:8] in str(excluded["node"])
        assert "workers in a row died there" in str(excluded["cause"])
        assert "nodes kept from work" in output
        assert len(Cache.open(cache).read_index()) > 10
        assert Cache.open(cache).read_ledger()["sample"].drop_null().to_pylist() == []
    finally:
        ray.shutdown()
        cluster.shutdown()
