"""What the benchmark of stage 1 reads out of a run."""

from pathlib import Path

import pytest

from preprocess.benchmark import Launching, Row, _busy, table
from preprocess.timeline import TIMELINE_FILE, Interval, Timeline

START = 1_700_000_000.0


def test_a_row_tells_what_the_gpu_and_what_its_launching_thread_did_in_the_counted_time(tmp_path: Path) -> None:
    timeline = Timeline(START)
    for worker, slow in (("a", 0.0), ("b", 0.2)):
        timeline.started(worker, START)
        for second in range(30):
            at = START + second
            shares = {"vae": (0.0, 0.9 - slow), "launch": (0.0, 0.3), "wait": (0.3, 0.4 + slow), "ahead": (0.6, 0.9)}
            if second < 10:  # warming up
                shares = {"wait": (0.0, 1.0)}
            for kind, (start, end) in shares.items():
                timeline.add(worker, [Interval(kind=kind, start=at + start, end=at + end)])  # type: ignore[arg-type]
    (tmp_path / TIMELINE_FILE).write_bytes(timeline.to_json(START + 30))
    busy, wait, launching = _busy(tmp_path, START + 10, START + 29)
    assert (busy, wait) == (pytest.approx(0.8), pytest.approx(0.2))
    assert launching.launch == pytest.approx(0.3)
    assert launching.ahead == pytest.approx(0.3)
    assert launching.wait == pytest.approx(0.2)
    assert launching.rest == pytest.approx(0.2)

    row = Row(
        bucket="16x256x256", decoder="cpu", workers=2, cpu_cores=32, samples=1, seconds=19.0, samples_per_second=160.0,
        frames_per_second=2560.0, tokens_per_second=19200.0, busy=busy, wait=wait, launching=launching, of_alone=0.95,
        times_one=1.96,
    )  # fmt: skip
    line = table({"16x256x256": {"samples_per_second": 84.2}}, [row]).splitlines()
    assert line[2].endswith("| 80.0% | 20.0% | 168.40 | 95.0% | 1.960 | 30%, 30%, 20%, 20% |")
    assert line[0].count("|") == line[1].count("|") == line[2].count("|")
    assert isinstance(launching, Launching)
