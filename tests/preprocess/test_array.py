"""The recipe for job arrays, run as Slurm runs it: two tasks of one array at once, on one machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache.dataset import Cache
from tests.preprocess.conftest import ROOT, Command, demo_options


@pytest.mark.slow
def test_the_tasks_of_an_array_encode_every_clip_once_and_run_again_encode_nothing(
    demo_cache: Path, verify: Command, clips_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    tools = Path(sys.executable).parent  # where the `python` is that the script names

    def run() -> list[str]:
        tasks = []
        for number in "12":
            array = {"SLURM_ARRAY_JOB_ID": tmp_path.name[-8:], "SLURM_ARRAY_TASK_ID": number}
            environment = inherited | array | {"SLURM_ARRAY_TASK_COUNT": "2"}
            environment["PATH"] = f"{tools}{os.pathsep}{inherited['PATH']}"
            command = ["bash", "examples/slurm_array.sh", *map(str, demo_options(clips_folder, cache))]
            tasks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        output = [task.communicate(timeout=400)[0] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], output
        return output

    run()
    index, demo = Cache.open(cache).read_index(), Cache.open(demo_cache).read_index()
    assert sorted(index["sample"].to_pylist()) == sorted(demo["sample"].to_pylist())
    assert verify(cache).returncode == 0
    before = sorted(path.name for path in cache.glob("index/*"))
    run()
    assert sorted(path.name for path in cache.glob("index/*")) == before
