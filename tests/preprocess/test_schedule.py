"""Who gets which shard, and what becomes of what fails by something that passes: decisions without workers."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from preprocess.events import LeftPending, Retried
from preprocess.schedule import MAX_ATTEMPTS, Schedule
from shared.clips.plan import ShardTask
from tests.preprocess.scheduled import STREAMS, Clock, Cluster, schedule, shard, shards, take


def test_tasks_are_handed_out_in_their_order_and_the_schedule_ends() -> None:
    tasks = shards(3, 2)
    made = schedule(tasks)
    for task in tasks:
        assert not made.is_over
        assert made.next() is task
        made.done(task.shard_id)
    assert made.next() is None
    assert made.is_over
    assert (made.num_committed, made.num_refused, made.num_pending) == (6, 0, 0)


def test_ten_million_samples_are_never_made_at_once() -> None:
    class Lazy(Sequence[ShardTask]):
        made = 0

        def __len__(self) -> int:
            return 10_000_000

        def __getitem__(self, index: Any) -> Any:
            Lazy.made += 1
            return shard([str(index)])

        def __iter__(self) -> Iterator[ShardTask]:
            raise AssertionError("all tasks were gone through")

    lazy = Schedule(Lazy(), num_members=10_000_000, streams=STREAMS, num_workers=4)
    for _ in range(4):
        take(lazy)
    assert Lazy.made == 4
    assert lazy.num_pending == 10_000_000


def test_throttled_tasks_back_off_and_are_given_up_in_the_end() -> None:
    task, clock = shard(["a", "b"]), Clock()
    made = schedule([task], clock=clock)
    delays = []
    for _ in range(MAX_ATTEMPTS - 1):
        assert made.next() is task
        (retried,) = made.failed(task.shard_id, "503 SlowDown")
        assert isinstance(retried, Retried)
        assert made.next() is None
        assert made.wait_seconds() == pytest.approx(retried.delay_seconds)
        assert not made.is_over
        delays.append(retried.delay_seconds)
        clock.now += retried.delay_seconds
    assert delays == [2, 4, 8, 16, 32, 60]
    take(made)
    (left,) = made.failed(task.shard_id, "503 SlowDown")
    cause = f"failed {MAX_ATTEMPTS} times: 503 SlowDown"
    example = f"{task.samples[0].source}, in shard {task.shard_id[:8]}: {cause}"
    assert left == LeftPending(key=task.shard_id, num_members=2, cause=cause, example=example)
    assert made.left == [left]
    assert (made.is_over, made.num_pending, made.num_refused) == (True, 2, 0)


def test_a_store_that_throttles_everything_is_not_asked_for_every_shard() -> None:
    clock = Clock()
    made = schedule(shards(1000, 1), num_workers=4, clock=clock)
    handed_out = 0
    while (task := made.next()) is not None:
        handed_out += 1
        made.failed(task.shard_id, "503 SlowDown")
    assert handed_out == 16


def test_a_store_that_never_answers_stops_the_job() -> None:
    clock = Clock()
    cluster = Cluster(schedule(shards(1000, 1), clock=clock), clock, random.Random(0), chance_failure=1.0)
    cluster.run()
    assert cluster.made.stopped is not None
    assert "the store" in cluster.made.stopped
    assert cluster.made.num_pending == 1000


def test_clips_that_fail_by_something_that_passes_stay_pending() -> None:
    task = shard(["a", "b", "c"])
    made = schedule([task])
    take(made)
    made.done(task.shard_id, num_refused=1, pending={"b": "timed out"})
    assert made.pending_clips == {"b": "timed out"}
    assert (made.num_committed, made.num_refused, made.num_pending) == (1, 1, 1)


def test_draining_hands_out_nothing_and_ends_when_all_is_done_or_at_the_deadline() -> None:
    for finishes in (True, False):
        tasks, clock = shards(3, 1), Clock()
        made = schedule(tasks, num_workers=2, clock=clock)
        take(made), take(made)
        made.done(tasks[0].shard_id)
        made.drain(30)
        assert made.next() is None
        assert not made.is_over
        if finishes:
            made.done(tasks[1].shard_id)
        else:
            clock.now += 30
        assert made.is_over
        assert made.num_pending == (1 if finishes else 2)


def test_shards_of_which_no_clip_can_be_had_stop_the_job_and_stay_pending() -> None:
    tasks = shards(40, 2)
    made = schedule(tasks)
    stops = []
    for _ in range(12):
        if (task := made.next()) is None:
            break
        assert isinstance(task, ShardTask)
        stops += made.done(task.shard_id, pending={sample.sample: "not_reachable" for sample in task.samples})
    assert len(stops) == 1
    assert "not_reachable" in stops[0].message
    assert (made.num_committed, made.num_pending) == (0, 80)
