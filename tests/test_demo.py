"""`make demo`, whole, beside another Ray and with its own ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent


def ray_processes() -> set[int]:
    """Returns the processes of all Ray clusters on the machine."""
    return {
        process.pid for process in psutil.process_iter(["name"]) if process.info["name"] in ("raylet", "gcs_server")
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_learns_its_captions_and_ends_what_it_started(tmp_path: Path) -> None:
    before = ray_processes()
    command = [sys.executable, "-m", "examples.demo", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert {"overview.png", "loss.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(list((tmp_path / "out" / "samples").glob("*.mp4"))) == 6
    assert ray_processes() <= before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_stopped_ends_its_ray(tmp_path: Path, number: int) -> None:
    before = ray_processes()
    command = [sys.executable, "-m", "examples.demo", "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        deadline = time.monotonic() + 120
        while not ray_processes() - before:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(3)
        os.kill(demo.pid, number)
        assert demo.wait(timeout=60) in (130, 143)
    assert ray_processes() <= before
