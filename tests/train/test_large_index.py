"""A large index: opened once, memory that does not grow while batches are read."""

import json
import subprocess
import sys

import pytest

from tests.train.synthetic_index import write_large_index


def measured(root, num_rows: int, steps: int) -> dict[str, float]:
    command = (sys.executable, "-m", "tests.train.synthetic_index", root, str(num_rows), str(steps))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_stays_flat_while_batches_of_a_million_samples_are_read(tmp_path):
    write_large_index(tmp_path / "c", 1_000_000)
    first = measured(tmp_path / "c", 1_000_000, 200)
    assert first["late_mb"] - first["early_mb"] < 16
    again = measured(tmp_path / "c", 1_000_000, 1)
    assert again["open_seconds"] < first["open_seconds"] / 3  # mapped, not built again
    assert again["peak_mb"] < first["peak_mb"] / 2


@pytest.mark.slow
def test_memory_stays_flat_over_an_epoch_of_a_million_samples(tmp_path):
    write_large_index(tmp_path / "c", 1_000_000)
    epoch = measured(tmp_path / "c", 1_000_000, 1_000_000 // 256 + 1)
    assert epoch["samples"] >= 1_000_000
    assert epoch["late_mb"] - epoch["early_mb"] < 16
