"""When workers were busy: added up, kept small, stored and drawn."""

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.timeline import KINDS, NOTHING, NUM_BINS, Interval, Kind, Stored, Timeline, WorkerSeconds, main, parse
from preprocess.timeline_plot import draw
from shared.errors import InputError

START = 1_700_000_000.0


def interval(kind: Kind, start: float, end: float) -> Interval:
    """Returns an interval, in seconds from the start."""
    return Interval(kind=kind, start=START + start, end=START + end)


def stored(timeline: Timeline, seconds: float) -> Stored:
    """Returns what is stored of a timeline so many seconds after its start."""
    return parse(timeline.to_json(START + seconds))


def many(num_workers: int, seconds: float) -> Stored:
    """Returns a timeline of busy workers."""
    timeline = Timeline(START)
    for worker in range(num_workers):
        timeline.started(f"w{worker:04}", START)
        timeline.add(f"w{worker:04}", [interval("vae", 0, seconds * 0.9), interval("wait", 0, seconds)])
    return stored(timeline, seconds)


def test_seconds_add_up_whatever_the_bins() -> None:
    rng = random.Random(0)
    timeline = Timeline(START)
    timeline.started("w", START)
    expected = dict.fromkeys(("text", "vae", "wait", "commit"), 0.0)
    clock = 0.0
    for _ in range(2000):
        kind: Kind = rng.choice(["text", "vae", "wait", "commit"])
        length = rng.choice([0.001, 0.3, 5.0, 100.0]) * rng.random()
        timeline.add("w", [interval(kind, clock, clock + length)])
        expected[kind] += length
        clock += length
    assert clock > 4 * NUM_BINS
    seconds = timeline.totals(START + clock)["w"]
    assert seconds.alive == pytest.approx(clock)
    kept = stored(timeline, clock)
    assert kept.num_bins <= NUM_BINS
    for kind, value in expected.items():
        assert getattr(seconds, kind) == pytest.approx(value, abs=1e-3)
        assert kept.workers[0].percent[kind].sum() / 100 * kept.bin_seconds == pytest.approx(value, rel=0.05)
    together = sum(kept.workers[0].percent.values())
    assert np.abs(together[:-1] - 100).max() <= 3


def test_bins_are_where_the_work_was() -> None:
    timeline = Timeline(START)
    timeline.started("w", START)
    timeline.add("w", [interval("vae", 1000, 1500.5)])
    timeline.add("w", [interval("text", 10, 20)])
    kept = stored(timeline, 2000)
    middles = (np.arange(kept.num_bins) + 0.5) * kept.bin_seconds
    busy = kept.workers[0].percent["vae"] > 50
    assert middles[busy].min() == pytest.approx(1000, abs=kept.bin_seconds)
    assert middles[busy].max() == pytest.approx(1500, abs=kept.bin_seconds)
    assert (kept.workers[0].percent["vae"][busy][1:-1] == 100).all()


def test_a_day_of_a_worker_takes_no_more_memory_than_a_minute() -> None:
    timeline = Timeline(START)
    timeline.started("w", START)
    for hour in range(24 * 7):
        timeline.add("w", [interval("vae", hour * 3600, hour * 3600 + 3000)])
    row = timeline._rows["w"]
    assert row.bins.size == len(KINDS) * NUM_BINS
    assert len(timeline._recent) < 200 * 24 * 7
    timeline.recent(START + 24 * 7 * 3600)
    assert len(timeline._recent) <= 61
    assert len(timeline.to_json(START + 24 * 7 * 3600)) < 10_000


def test_a_worker_that_was_away_is_not_idle() -> None:
    timeline = Timeline(START)
    timeline.started("w", START)
    timeline.add("w", [interval("vae", 0, 100)])
    timeline.ended("w", START + 100)
    timeline.ended("w", START + 150)
    timeline.started("w", START + 300)
    timeline.add("w", [interval("vae", 300, 350)])
    totals = timeline.totals(START + 400)["w"]
    assert (totals.alive, totals.busy) == (200, 0.75)
    kept = stored(timeline, 400).workers[0]
    assert kept.alive[:100].all()
    assert not kept.alive[100:300].any()
    assert timeline.num_alive == 1


def test_a_worker_that_came_within_a_bin_was_not_idle_before() -> None:
    timeline = Timeline(START)
    timeline.started("w", START + 1001)
    timeline.add("w", [interval("vae", 1001, 2000)])
    kept = stored(timeline, 2000)
    assert kept.bin_seconds == 4
    worker = kept.workers[0]
    assert worker.percent["vae"][worker.alive].min() == pytest.approx(100, abs=1)


def test_waiting_counts_only_where_no_kernel_ran() -> None:
    assert WorkerSeconds(alive=10, text=1, vae=8, wait=9, commit=0).data_wait == pytest.approx(0.1)
    assert WorkerSeconds(alive=10, text=1, vae=2, wait=3, commit=0).data_wait == pytest.approx(0.3)
    assert NOTHING.busy is None


def test_the_last_minute_is_that_of_all_living_workers() -> None:
    timeline = Timeline(START)
    assert timeline.recent(START + 10) == (None, None)
    for worker in ("a", "b"):
        timeline.started(worker, START)
        timeline.add(worker, [interval("vae", 0, 100)])
    timeline.add("a", [interval("vae", 100, 160)])
    timeline.add("b", [interval("wait", 100, 130)])
    busy, wait = timeline.recent(START + 160)
    assert (busy, wait) == (pytest.approx(0.5, abs=0.02), pytest.approx(0.25, abs=0.02))


def test_a_timeline_that_tells_of_fewer_kinds_is_read() -> None:
    value = json.loads(timeline_of_one().to_json(START + 10))
    for worker in value["workers"]:
        del worker["percent"]["launch"], worker["percent"]["ahead"]
    (worker,) = parse(json.dumps(value).encode()).workers
    assert worker.percent["vae"].sum() == pytest.approx(500, abs=2)
    assert worker.percent["launch"].sum() == 0


def test_what_the_launching_thread_is_about_is_kept_beside_what_the_gpu_does() -> None:
    timeline = timeline_of_one()
    timeline.add("w", [interval("launch", 0, 2), interval("ahead", 2, 9)])
    (worker,) = stored(timeline, 10).workers
    assert [worker.percent[kind].sum() for kind in ("vae", "launch", "ahead")] == pytest.approx([500, 200, 700], abs=2)
    assert timeline.totals(START + 10)["w"] == WorkerSeconds(alive=10.0, text=0.0, vae=5.0, wait=0.0, commit=0.0)


def timeline_of_one() -> Timeline:
    """Returns that of a worker whose autoencoder was busy for the first 5 s."""
    timeline = Timeline(START)
    timeline.started("w", START)
    timeline.add("w", [interval("vae", 0, 5)])
    return timeline


def test_what_is_no_timeline_is_refused() -> None:
    for data in (b"", b"[]", b'{"format": "x", "version": 1}', b'{"format": "latentmill-timeline", "version": 2}'):
        with pytest.raises(InputError, match="expected what a job wrote"):
            parse(data)


@pytest.mark.parametrize("num_workers", [0, 1, 3, 300])
def test_any_number_of_workers_is_drawn_in_a_picture_of_bounded_size(num_workers: int) -> None:
    picture = Image.open(io.BytesIO(draw(many(num_workers, 30))))
    assert picture.width <= 1400
    assert picture.height <= 1200
    colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert (len(colours) > 20) or not num_workers


def test_the_command_draws_the_newest_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timeline = Timeline(START)
    timeline.started("w", START)
    timeline.add("w", [interval("vae", 0, 30)])
    for name in ("20230101T000000Z-00000000", "20240101T000000Z-00000000"):
        folder = tmp_path / "cache/runs" / name
        folder.mkdir(parents=True)
        (folder / "timeline.json").write_bytes(timeline.to_json(START + 30))
    (tmp_path / "cache/runs/20250101T000000Z-00000000").mkdir()
    monkeypatch.setattr(sys, "argv", ["timeline", str(tmp_path / "cache"), "--output", str(tmp_path / "t.png")])
    assert main() == 0
    assert "20240101T000000Z" in capsys.readouterr().out
    assert Image.open(tmp_path / "t.png").format == "PNG"
