"""A rank that fails by itself, in the middle of a step, without a launcher that would end the others."""

import socket
import subprocess
import sys

import pytest

from tests.train.distributed.launch import ROOT
from tests.train.test_command_line import ENVIRONMENT, MODEL

OPTIONS = ("--steps", "4", "--log-every", "1", "--batch-size", "4", "--num-workers", "0", "--peak-tflops", "1")


@pytest.mark.parametrize(
    ("cause", "code", "told"),
    [
        ("device", 1, "OSError: [Errno 5] Input/output error: 'a device that is gone'"),
        ("memory", 2, "error: step 2: the device of rank 1 has too little memory for 2 samples"),
    ],
)
def test_a_rank_that_fails_in_a_step_waits_for_nobody_and_nobody_for_it(small_cache, tmp_path, cause, code, told):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "FAILS_WITH": cause,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "tests.train.distributed.failing_rank", "--cache", small_cache.url]
    command += ["--output", str(tmp_path / "run"), *MODEL, *OPTIONS]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, code], outputs
    assert told in outputs[1]
    assert "step 1/4" in outputs[0]
