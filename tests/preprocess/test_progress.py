"""The bar, the heartbeats, and the run folder with its events and figures."""

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from preprocess.events import Committed, Convicted, Ended, Halved, Heartbeat, Planned, Started, WorkerLost, event_json
from preprocess.metrics import METRICS, gauges
from preprocess.progress import Progress
from preprocess.run_folder import RunFolder
from preprocess.timeline import Interval, Timeline
from shared.cache.ledger import Refusal
from shared.stores.local import LocalStore
from shared.stores.store import StoreError

START = 1_700_000_000.0


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Says that somebody watches."""

    def isatty(self) -> bool:
        return True


class MoodyStore(LocalStore):
    """Refuses to write when told to."""

    refuses = False

    def write(self, path: str, data: bytes) -> None:
        if self.refuses:
            raise StoreError("no answer")
        super().write(path, data)


def events(folder: Path) -> list[dict]:
    """Returns the events of the only run of a cache."""
    parts = sorted(folder.glob("runs/*/events-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def loss(number: int) -> WorkerLost:
    """Returns an event."""
    return WorkerLost(worker=f"w{number}", node="10.0.0.1", cause="SIGKILL")


def run_minute(progress: Progress, clock: Clock, seconds: int, add: int) -> None:
    """Lets seconds pass, each with so many clips."""
    with progress.phase("encoding", 1000, "clip") as phase:
        for _ in range(seconds):
            clock.now += 1
            phase.add(add)


def test_in_a_log_a_line_is_written_every_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    run_minute(Progress(Timeline(START), stream=stream, clock=clock), clock, 35, 10)
    lines = stream.getvalue().split("\n")
    counts = [part for line in lines for part in line.split() if part.endswith("/1000")]
    assert counts == ["100/1000", "200/1000", "300/1000", "350/1000"]
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_one_line_is_drawn_again_and_fits() -> None:
    clock, stream = Clock(), Terminal()
    run_minute(Progress(Timeline(START), stream=stream, clock=clock), clock, 5, 10)
    drawn = stream.getvalue().split("\r")[1:]
    assert len(drawn) == 6
    assert all(len(line.rstrip("\n")) < 80 for line in drawn)
    assert [line.count("\n") for line in drawn] == [0, 0, 0, 0, 0, 1]


def test_the_bar_says_rate_over_the_last_minute_busy_wait_and_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    timeline = Timeline(START)
    timeline.started("w", START)
    timeline.add(
        "w",
        [
            Interval(kind="vae", start=START + 60, end=START + 105),
            Interval(kind="wait", start=START + 105, end=START + 111),
        ],
    )
    progress = Progress(timeline, stream=stream, clock=clock)
    with progress.phase("encoding", 1000, "clip") as phase:
        for second in range(120):
            clock.now += 1
            phase.add(1 if second < 60 else 5)
    last = stream.getvalue().splitlines()[-1]
    assert "360/1000 [02:00<02:08, 5.0 clips/s, encoders 75%, data wait 10%]" in last


def test_a_phase_with_nothing_to_do_draws_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(Timeline(START), stream=stream, clock=clock)
    with progress.phase("texts", 0, "text"):
        clock.now += 30
        progress.tick()
    assert stream.getvalue() == ""
    assert progress.seconds == {"texts": 30}


def test_a_lost_shard_is_taken_back_and_phases_of_one_name_add_up() -> None:
    clock = Clock()
    progress = Progress(Timeline(START), stream=io.StringIO(), clock=clock)
    for _ in range(2):
        with progress.phase("texts", 10, "text") as phase:
            phase.add(4)
            phase.add(-4)
            clock.now += 5
            assert progress.heartbeat().num_done == 0
            assert progress.heartbeat().per_second == 0
    assert progress.seconds == {"texts": 10}


def test_heartbeats_come_every_ten_seconds_and_events_every_minute(tmp_path: Path) -> None:
    clock = Clock()
    run = RunFolder(LocalStore(tmp_path), clock)
    progress = Progress(Timeline(START), run=run, stream=io.StringIO(), clock=clock)
    run_minute(progress, clock, 65, 1)
    run.log(loss(0))
    run.close()
    parts = sorted(tmp_path.glob("runs/*/*"))
    assert [part.name for part in parts] == ["events-00000.jsonl", "events-00001.jsonl"]
    *beats, last = events(tmp_path)
    assert last["event"] == "worker_lost"
    assert [beat["num_done"] for beat in beats] == [10, 20, 30, 40, 50, 60]
    assert beats[0]["time"] == "2023-11-14T22:13:30.000Z"
    assert beats[-1]["per_second"] == 1.0
    assert re.fullmatch(r"20231114T221320Z-[0-9a-f]{8}", parts[0].parent.name)


def test_an_event_is_written_once_even_if_the_store_refuses_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, store = Clock(), MoodyStore(tmp_path)
    run = RunFolder(store, clock)
    for number, store.refuses in enumerate([False, True, True, False, False]):
        run.log(loss(number))
        clock.now += 61
        run.tick()
        assert run._writing is not None
        run._writing.result()
    run.log(loss(5))
    run.close()
    assert [event["worker"] for event in events(tmp_path)] == [f"w{i}" for i in range(6)]
    assert "could not be written: no answer" in capsys.readouterr().err


def test_a_store_that_refuses_to_the_end_does_not_stop_the_job(tmp_path: Path) -> None:
    store = MoodyStore(tmp_path)
    run = RunFolder(store)
    store.refuses = True
    run.log(loss(0))
    run.close()
    assert not run.write("summary.json", b"{}")


def test_events_are_lines_of_json_with_a_time_a_name_and_no_credentials() -> None:
    clock = Clock()
    refusal = Refusal(
        source="https://key:secret@host/a.mp4?X-Amz-Signature=secret", sample="s", reason="kills_workers", detail="d"
    )
    made = [
        Started(
            config={"manifest": "s3://key:secret@bucket/list.csv", "retry_refused": ("a",), "fps": None},
            versions={"ray": "2"},
        ),
        Planned(num_shards=1, num_samples=2, num_texts=0, num_committed_before=0, seconds=0.5),
        Committed(key="k", shard="shards/x.tar", num_members=2, num_bytes=9, worker="w", is_created=True),
        Halved(key="k", cause="GET 'https://host/a?token=secret' failed, then https://u:secret@h/b", halves=("a", "b")),
        Convicted(key="k", refusal=refusal),
        Ended(exit_reason="finished", exit_code=0),
    ]
    lines = [json.dumps(event_json(event, datetime.fromtimestamp(clock(), UTC))) for event in made]
    assert "secret" not in "".join(lines)
    values = [json.loads(line) for line in lines]
    assert [value["event"] for value in values] == ["started", "planned", "committed", "halved", "convicted", "ended"]
    assert values[0]["config"]["manifest"] == "s3://bucket/list.csv"
    assert values[3]["cause"] == "GET 'https://host/a' failed, then https://h/b"
    assert values[4]["refusal"]["source"] == "https://host/a.mp4"
    assert values[5] == {
        "time": "2023-11-14T22:13:20.000Z",
        "event": "ended",
        "exit_reason": "finished",
        "exit_code": 0,
    }


def test_metrics_have_names_that_prometheus_takes_and_gauges_are_among_them() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(re.fullmatch(r"latentmill_[a-z_]+", metric.name) for metric in METRICS)
    beat = Heartbeat(
        phase="encoding", num_done=1, num_total=2, unit="clip", per_second=3.0, gpu_busy=0.5, data_wait=0.1,
        eta_seconds=None, num_workers=4,
    )  # fmt: skip
    shown = gauges(beat)
    assert all(
        metric in METRICS and metric.kind == "gauge" and set(tags) == set(metric.tag_keys) for metric, _, tags in shown
    )
    assert {metric.name for metric, _, _ in shown} == {metric.name for metric in METRICS if metric.kind == "gauge"}
