"""The engine on Ray: told to end, workers for texts alone, windows, decoders that hang, nodes that die."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from examples.ray_head import RayHead
from shared.cache.dataset import Cache
from tests.preprocess.conftest import ROOT, Command, demo_options
from tests.preprocess.test_job import shards, table


def summary(cache: Path) -> dict[str, object]:
    """Returns the figures of the newest run."""
    newest = max((cache / "runs").iterdir())
    assert {"summary.json", "timeline.json", "timeline.png", "events-00000.jsonl"} <= {f.name for f in newest.iterdir()}
    figures: dict[str, object] = json.loads((newest / "summary.json").read_text())
    return figures


def test_a_job_that_is_told_to_end_says_so_and_the_next_one_goes_on(
    demo_cache: Path, preprocess: Command, ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = [*demo_options(clips_folder, cache), "--shard-samples", 1]
    command = [sys.executable, "-m", "preprocess", *map(str, options)]
    with subprocess.Popen(command, cwd=ROOT, env=ray_head.environment, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 240
        while not list(cache.glob("index/*.parquet")):
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 3, errors
    assert "pending: the same command goes on with them" in errors
    figures = summary(cache)
    assert (figures["exit_reason"], figures["exit_code"]) == ("told to end", 3)
    num_before = len(Cache.open(cache).read_index())
    assert 0 < num_before < 12
    again = preprocess(*options)
    assert again.returncode == 0, again.stderr
    assert table(again)["samples encoded"] == str(12 - num_before)
    samples = [sorted(Cache.open(folder).read_index()["sample"].to_pylist()) for folder in (cache, demo_cache)]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_an_interrupted_job_says_that_it_goes_on_and_is_no_defect(
    ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "preprocess", *map(str, demo_options(clips_folder, cache)), "--shard-samples", "1"]
    with subprocess.Popen(command, cwd=ROOT, env=ray_head.environment, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 240
        while not list(cache.glob("index/*.parquet")):
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert errors.endswith("what is committed stays; the same command goes on with the rest\ninterrupted\n")
    figures = summary(cache)
    assert (figures["exit_reason"], figures["exit_code"]) == ("interrupted", 130)


def test_workers_for_texts_alone_make_the_same_bytes(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    result = preprocess(*demo_options(clips_folder, tmp_path / "cache"), "--text-gpus", 1)
    assert result.returncode == 0, result.stderr
    assert shards(tmp_path / "cache") == shards(demo_cache)
    assert {name.partition("-")[0] for name in summary(tmp_path / "cache")["workers"]} == {"vae", "text"}  # type: ignore[attr-defined]


def test_a_dry_run_says_what_the_job_then_does_with_windows_and_flips(
    preprocess: Command, verify: Command, clips_folder: Path, tmp_path: Path
) -> None:
    cache, manifest = tmp_path / "cache", shutil.copytree(clips_folder, tmp_path / "clips") / "clips.csv"
    with manifest.open("a") as rows:
        rows.write("elsewhere.mp4,A clip that is not there.\ntowers_teal.mp4,\n")
    options = ["--preset", "demo", "--manifest", manifest, "--output", cache, "--buckets", "4x64x64"]
    options += ["--windows-per-clip", 3, "--flip"]
    said = preprocess(*options, "--dry-run")
    assert said.returncode == 0, said.stderr
    for refused in (
        "missing: 1, e.g. elsewhere.mp4: no file",
        "no_caption: 1, e.g. towers_teal",
        "not_a_video: 1, e.g. ",
    ):
        assert f"\nRefused, {refused}" in said.stdout
    assert not (cache / "dataset.json").exists()
    num_samples = int(next(line for line in said.stdout.splitlines() if line.startswith("4x64x64")).split()[2])
    assert num_samples == 6 * 3 * 2
    result = preprocess(*options)
    assert result.returncode == 0, result.stderr
    assert table(result)["samples encoded"] == str(num_samples)
    rows = Cache.open(cache).read_index().to_pylist()
    assert len({(row["source"], row["window"], bool(row["flip"])) for row in rows}) == num_samples
    checked = verify(cache, "--deep", 6, "--decode", 2)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "encoded again: 13 equal" in checked.stdout  # six latents and, of one clip, two captions


@pytest.mark.slow
def test_clips_that_take_too_long_to_decode_are_refused_and_the_job_goes_on(
    preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = preprocess(*demo_options(clips_folder, cache), "--decode-timeout", 0.001)
    assert first.returncode == 1, first.stderr
    assert "every clip was refused" in first.stderr
    assert "decode_timeout" in set(Cache.open(cache).read_ledger()["reason"].to_pylist())
    again = preprocess(*demo_options(clips_folder, cache), "--retry-refused", "decode_timeout")
    assert again.returncode == 0, again.stderr
    assert table(again)["samples encoded"] == "12"


@pytest.mark.slow
def test_a_node_that_dies_costs_no_sample(demo_cache: Path, clips_folder: Path, tmp_path: Path) -> None:
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        cache = tmp_path / "cache"
        options = [*demo_options(clips_folder, cache), "--address", cluster.address, "--workers", 2]
        command = [sys.executable, "-m", "preprocess", *map(str, options)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as job:
            deadline = time.monotonic() + 240
            while not list(cache.glob("index/*.parquet")):
                assert time.monotonic() < deadline
                assert job.poll() is None
                time.sleep(0.02)
            cluster.remove_node(nodes[0], allow_graceful=False)
            _, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
        assert shards(cache) == shards(demo_cache)
        assert not len(Cache.open(cache).read_ledger().filter(Cache.open(cache).read_ledger()["sample"].is_valid()))
    finally:
        ray.shutdown()
        cluster.shutdown()
