"""What a run adds to files while it trains, on a disk that is full: one line, and what was there before stays."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shared.cache.ledger import Refusal
from shared.errors import InputError
from train.boards import open_boards
from train.config import LogOptions
from train.online.ledger import OnlineLedger
from train.run_folder import write_durably

ROOT = Path(__file__).parents[2]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing more into a file fails, as it does on a full disk, part of it being written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refusal(number: int) -> Refusal:
    return Refusal(source=f"{number}.mp4", sample=f"sample {number}", reason="not_decodable", detail="x" * 100)


def test_a_ledger_that_cannot_grow_says_so_and_keeps_its_lines(tmp_path):
    ledger = OnlineLedger(tmp_path / "refused-rank00000.jsonl")
    ledger.add(refusal(0))
    with (
        files_of_at_most(ledger.path.stat().st_size + 50),
        pytest.raises(InputError, match=r"limit on the size of files is reached .* while writing refused-rank00000"),
    ):
        ledger.add(refusal(1))
    assert "sample 1" not in ledger
    again = OnlineLedger(ledger.path)
    assert "sample 0" in again
    assert "sample 1" not in again
    again.add(refusal(1))
    assert "sample 1" in OnlineLedger(ledger.path)


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before_it(tmp_path):
    file = tmp_path / "refused.jsonl"
    write_durably(file, b"the first\n")
    with files_of_at_most(50), pytest.raises(InputError, match="limit on the size of files"):
        write_durably(file, b"y" * 100)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"the first\n"]


def test_tensorboard_on_a_full_disk_is_one_line_and_no_thread_tells_of_it(tmp_path):
    code = (
        "import sys\n"
        "from tests.train.test_full_disk import fill_tensorboard\n"
        "from shared.errors import run_entry_point\n"
        f"sys.exit(run_entry_point(lambda: fill_tensorboard({str(tmp_path)!r}), debug=False))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 2, told.stderr
    (line,) = told.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/tensorboard: the limit on the size of files is reached")
    assert "while writing for TensorBoard" in line


def fill_tensorboard(folder: str) -> int:
    """Shows pictures until there is no room for one."""
    (board,) = open_boards(LogOptions(tensorboard=True), Path(folder), {}, 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with files_of_at_most(20_000):
        for step in range(9):
            board.clip(step, "noise", noise, Path("unused.mp4"), "noise")
    return 0
