"""The job on Ray, by its command line, on real clips."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from examples.ray_head import RayHead
from shared.cache.dataset import Cache
from tests.preprocess.conftest import ROOT, Command, demo_options


def shards(cache: Path) -> dict[str, bytes]:
    """Returns every shard's bytes by its name."""
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.glob("shards/*/*.tar")}


def kept(cache: Path) -> list[Path]:
    """Returns the files of a cache but for what runs leave of themselves."""
    return [path for path in cache.rglob("*") if path.is_file() and path.relative_to(cache).parts[0] != "runs"]


def table(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Returns the closing table."""
    lines = result.stdout.partition("\n\n")[0].splitlines()
    rows = (line.rsplit(maxsplit=1) for line in lines if line.strip())
    return {name.strip(): value for name, value in rows}


def test_every_clip_is_encoded_or_in_the_ledger(demo_cache: Path) -> None:
    cache = Cache.open(demo_cache)
    index = cache.read_index()
    assert len(index) == 12
    assert len(set(index["source"].to_pylist())) == 6
    ledger = cache.read_ledger().to_pylist()
    assert [(row["source"], row["reason"]) for row in ledger] == [("not_a_video.mp4", "not_a_video")]


def test_two_workers_write_the_same_bytes_as_one(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    result = preprocess(*demo_options(clips_folder, tmp_path / "two"), "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert "2 CPU workers load the encoders; the cluster has 0 GPUs, 0 free and 2 CPUs, " in result.stderr
    assert "\nencoding on cpu " in result.stderr
    assert shards(tmp_path / "two") == shards(demo_cache)
    assert table(result) == table(result) | {
        "manifest rows": "8",
        "clips": "7",
        "samples encoded": "12",
        "refused": "1",
        "not_a_video": "1",
    }


def test_a_second_run_encodes_nothing(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in kept(cache)}
    result = preprocess(*demo_options(clips_folder, cache))
    assert result.returncode == 0, result.stderr
    assert table(result)["samples encoded"] == "0"
    assert table(result)["samples already there"] == "12"
    assert {path: path.stat().st_mtime_ns for path in kept(cache)} == before
    newest = max((cache / "runs").iterdir())
    events = [json.loads(line)["event"] for line in (newest / "events-00000.jsonl").read_text().splitlines()]
    assert events == ["started", "planned", "ended"], "no worker is started for nothing"
    assert {path.name for path in newest.iterdir()} == {"events-00000.jsonl", "summary.json"}, "an empty timeline"


def test_a_killed_job_resumes_without_encoding_anything_twice(
    demo_cache: Path, preprocess: Command, ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "preprocess", *map(str, demo_options(clips_folder, cache))]
    with subprocess.Popen(command, cwd=ROOT, env=ray_head.environment, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 240
        while not list(cache.glob("index/*.parquet")):
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
    time.sleep(5)  # Ray ends the dead driver's actors; one may still commit the shard in its hands
    committed = {path: path.stat().st_mtime_ns for path in cache.glob("shards/*/[!.]*.tar")}
    num_before = len(Cache.open(cache).read_index())
    assert 0 < num_before < 12
    result = preprocess(*demo_options(clips_folder, cache))
    assert result.returncode == 0, result.stderr
    assert table(result)["samples encoded"] == str(12 - num_before)
    assert table(result)["samples already there"] == str(num_before)
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert shards(cache) == shards(demo_cache)


def test_a_worker_that_dies_is_replaced_and_its_shard_encoded(
    demo_cache: Path, ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "preprocess", *map(str, demo_options(clips_folder, cache))]
    with subprocess.Popen(command, cwd=ROOT, env=ray_head.environment, stderr=subprocess.DEVNULL) as job:
        deadline = time.monotonic() + 240
        while not list(cache.glob("index/*.parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for worker in _encoding_actors(ray_head):
            os.kill(worker, signal.SIGKILL)
        assert job.wait(timeout=240) == 0
    assert shards(cache) == shards(demo_cache)


def _encoding_actors(head: RayHead) -> list[int]:
    """Returns the processes of this head's encoding actors."""
    return [
        process.pid
        for process in psutil.Process(head.process_id).children(recursive=True)
        if "ray::_Worker" in " ".join(process.cmdline())
    ]


def test_a_disk_that_fills_up_gives_one_line_and_the_job_goes_on_when_there_is_room(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        result = preprocess(*demo_options(clips_folder, small / "cache"))
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "the disk is full" in errors[0]
        assert "Traceback" not in result.stderr
        assert list(Cache.open(small / "cache").store.leftovers()) == []
        assert 0 < len(Cache.open(small / "cache").read_index()) < 12
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        assert preprocess(*demo_options(clips_folder, small / "cache")).returncode == 0
        assert shards(small / "cache") == shards(demo_cache)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_jobs_on_one_cache_make_what_one_makes(
    demo_cache: Path, ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "preprocess", *map(str, demo_options(clips_folder, cache)), "--workers", "1"]
    jobs = [subprocess.Popen(command, cwd=ROOT, env=ray_head.environment) for _ in range(2)]
    assert [job.wait(timeout=400) for job in jobs] == [0, 0]
    assert shards(cache) == shards(demo_cache)
    index = Cache.open(cache).read_index()
    assert len(index) == 12
    assert len(list(cache.glob("index/*"))) == len(list(demo_cache.glob("index/*")))


def test_one_more_clip_costs_one_more_clip(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    before = shards(cache)
    for clip in clips_folder.iterdir():
        (tmp_path / clip.name).symlink_to(clip)
    (tmp_path / "more.csv").write_text((clips_folder / "clips.csv").read_text() + "second.mp4,The same birds again.\n")
    shutil.copy(clips_folder / "bird_portrait.mp4", tmp_path / "second.mp4")
    options = demo_options(clips_folder, cache)
    options[options.index(clips_folder / "clips.csv")] = tmp_path / "more.csv"
    result = preprocess(*options)
    assert table(result)["samples encoded"] == "2"
    assert before.items() < shards(cache).items()


def test_probing_counts_the_rows_that_name_no_clip_to_encode(
    ray_head: RayHead, clips_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "no_text_beside_it.mp4").touch()
    shutil.copy(clips_folder / "bird_portrait.mp4", tmp_path / "clips" / "bird.mp4")
    (tmp_path / "clips" / "bird.txt").write_text("A bird.")
    command = [
        sys.executable,
        "-m",
        "preprocess.probe",
        "--manifest",
        tmp_path / "clips",
        "--probes",
        tmp_path / "probes",
    ]
    probed = subprocess.run(command, cwd=ROOT, env=ray_head.environment, capture_output=True, text=True, check=False)
    assert probed.returncode == 0, probed.stderr
    rows = dict(line.rsplit(maxsplit=1) for line in probed.stdout.splitlines() if line)
    assert (rows["manifest rows"], rows["rows refused"], rows["  no_caption"], rows["clips"]) == ("2", "1", "1", "1")


def test_inside_a_ray_job_a_relative_output_is_refused(preprocess: Command, clips_folder: Path) -> None:
    options = demo_options(clips_folder, Path("relative/cache"))
    result = preprocess(*options, RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert result.returncode == 2
    assert "--output relative/cache: inside a Ray job the current folder is a temporary copy" in result.stderr
    assert not (ROOT / "relative").exists()


def test_bad_clips_go_to_the_ledger_and_the_rest_is_encoded(
    preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    good = clips_folder / "towers_teal.mp4"
    shutil.copy(good, tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:60_000])
    names = ["good.mp4", "empty.mp4", "text.mp4", "cut.mp4", "missing.mp4"]
    rows = [f"{name},A caption." for name in names] + ["towers.mp4,", ",no path"]
    (tmp_path / "m.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    options = ["--preset", "demo", "--manifest", tmp_path / "m.csv", "--output", tmp_path / "cache"]
    result = preprocess(*options, "--buckets", "16x64x64")
    assert result.returncode == 0, result.stderr
    cache = Cache.open(tmp_path / "cache")
    assert cache.read_index()["source"].to_pylist() == ["good.mp4"]
    reasons = {row["source"]: row["reason"] for row in cache.read_ledger().to_pylist()}
    assert reasons == {
        "empty.mp4": "empty",
        "text.mp4": "not_a_video",
        "cut.mp4": reasons["cut.mp4"],
        "missing.mp4": "missing",
        "towers.mp4": "no_caption",
        "row 7": "no_path",
    }
    too_long = preprocess(*options[:-1], tmp_path / "none", "--buckets", "80x64x64")
    assert too_long.returncode == 1
    assert "every clip was refused" in too_long.stderr
    assert "too_short" in Cache.open(tmp_path / "none").read_ledger()["reason"].to_pylist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--buckets", "16x100x100"], "height=100 is not divisible by the VAE's spatial stride of 8: use 96 or 104"),
        (["--manifest", "/nowhere.csv"], "manifest /nowhere.csv: no such file"),
        (["--output", "tests"], "but no dataset.json: expected an empty folder"),
        (
            # told before a cluster is joined
            ["--max-tokens", "77", "--posterior", "mean", "--text-codec", "float16+zstd", "--address", "127.0.0.1:1"],
            "its stream 'latent' was made with posterior='sample' (model demo:vae), this job has posterior='mean' "
            "(model demo:vae); its stream 'text.t5' was made with codec='bfloat16+zstd', max_tokens=120 (model "
            "demo:t5), this job has codec='float16+zstd', max_tokens=77 (model demo:t5): use the cache's own settings",
        ),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers"),
    ],
)
def test_a_mistake_gives_one_line_a_non_zero_exit_and_loses_nothing(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    cache = shutil.copytree(demo_cache, tmp_path / "cache")
    before = {path: path.read_bytes() for path in kept(cache)}
    result = preprocess(*demo_options(clips_folder, cache), *options)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in kept(cache)} == before
