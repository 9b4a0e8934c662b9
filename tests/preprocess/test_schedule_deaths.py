"""Shards whose workers die: who is to blame, and what becomes of the others."""

import math
import random
from collections import Counter

import pytest

from preprocess.events import Halved, LeftPending, Retried, Stopped
from preprocess.schedule import MAX_NODE_LOSSES
from preprocess.text_plan import SharedTextTask
from shared.clips.texts import Caption
from tests.preprocess.scheduled import Clock, Cluster, all_names, names, schedule, shard, shards, take


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 16, 37, 256])
def test_the_guilty_clip_is_found_with_few_deaths_and_all_others_are_committed(num_samples: int) -> None:
    for guilty in sorted({0, num_samples // 2, num_samples - 1}):
        tasks = shards(2, num_samples)
        clock = Clock()
        cluster = Cluster(schedule(tasks, clock=clock), clock, random.Random(0), killers=frozenset({f"0.{guilty}"}))
        cluster.run()
        assert cluster.refused == Counter({f"0.{guilty}": 1})
        assert cluster.committed == Counter(all_names(tasks) - {f"0.{guilty}"})
        assert cluster.num_deaths <= 3 + math.log2(num_samples) + 1
        assert cluster.made.num_pending == 0


def test_halves_are_named_by_their_members_and_keep_the_generation() -> None:
    whole = shard(["a", "b", "c"], generation=2)
    made = schedule([whole])
    for _ in range(3):
        last = made.lost(take(made).shard_id, "died", at_fault=True, is_committed=False)
    expected = [shard(["a"], generation=2), shard(["b", "c"], generation=2)]
    assert last == [Halved(key=whole.shard_id, cause="died", halves=(expected[0].shard_id, expected[1].shard_id))]
    assert [take(made), take(made)] == expected


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_sample_ends_up_once_in_cache_ledger_or_pending(seed: int) -> None:
    rng = random.Random(seed)
    tasks = shards(rng.randint(1, 40), rng.randint(1, 33))
    everyone = sorted(all_names(tasks))
    killers = frozenset(rng.sample(everyone, rng.randint(0, min(4, len(everyone)))))
    clock = Clock()
    made = schedule(tasks, num_workers=rng.choice([1, 2, 8]), clock=clock)
    cluster = Cluster(
        made,
        clock,
        rng,
        killers,
        chance_death=rng.choice([0, 0.05]),
        chance_node=rng.choice([0, 0.2]),
        chance_failure=rng.choice([0, 0.2, 0.5]),
        chance_after_commit=rng.choice([0, 0.3]),
        chance_pending=rng.choice([0, 0.1]),
    )
    cluster.run()
    assert set(cluster.committed.values()) <= {1}
    assert set(cluster.refused.values()) <= {1}
    assert not set(cluster.committed) & set(cluster.refused)
    settled = set(cluster.committed) | set(cluster.refused)
    assert (made.num_committed, made.num_refused) == (len(cluster.committed), len(cluster.refused))
    assert made.num_pending == len(everyone) - len(settled)
    assert not set(made.pending_clips) & settled
    if made.stopped is None:
        assert made.num_pending == len(made.pending_clips) + sum(left.num_members for left in made.left)
        if not cluster.chance_failure and not cluster.chance_node:
            assert killers <= set(cluster.refused)
        if not cluster.chance_death:
            assert set(cluster.refused) <= killers


def test_a_lost_node_is_never_held_against_a_shard() -> None:
    task = shard(["a", "b"])
    made = schedule([task])
    for _ in range(MAX_NODE_LOSSES - 1):
        assert take(made) is task
        assert made.lost(task.shard_id, "preempted", at_fault=False, is_committed=False) == [
            Retried(key=task.shard_id, cause="preempted", delay_seconds=0)
        ]
    take(made)
    (left,) = made.lost(task.shard_id, "preempted", at_fault=False, is_committed=False)
    assert isinstance(left, LeftPending)
    assert (made.is_over, made.num_pending, made.num_refused) == (True, 2, 0)


def test_a_shard_that_was_committed_before_its_worker_died_is_not_encoded_again() -> None:
    task = shard(["a", "b"])
    made = schedule([task])
    take(made)
    assert made.lost(task.shard_id, "SIGKILL", at_fault=True, is_committed=True, num_refused=1) == []
    assert (made.is_over, made.num_committed, made.num_refused) == (True, 1, 1)


def test_broken_workers_stop_the_job_before_any_clip_is_blamed() -> None:
    for num_shards, num_workers in ((100, 1), (100, 4), (3, 8), (1, 1)):
        tasks = shards(num_shards, 16)
        clock = Clock()
        cluster = Cluster(
            schedule(tasks, num_workers=num_workers, clock=clock),
            clock,
            random.Random(1),
            killers=frozenset(all_names(tasks)),
        )
        cluster.run()
        assert cluster.made.stopped is not None
        assert "in a row" in cluster.made.stopped
        assert [type(c) for c in cluster.consequences].count(Stopped) == 1
        assert not cluster.refused
        assert cluster.made.num_pending == num_shards * 16


def test_clips_that_are_all_that_is_left_are_refused_without_a_witness() -> None:
    tasks = [shard(["killer", "other killer"])]
    clock = Clock()
    cluster = Cluster(schedule(tasks, clock=clock), clock, random.Random(0), killers=frozenset(all_names(tasks)))
    cluster.run()
    assert set(cluster.refused) == {"killer", "other killer"}
    assert cluster.made.num_refused == 2


def test_a_shard_that_killed_a_worker_waits_until_others_were_tried() -> None:
    tasks = shards(40, 1)
    made = schedule(tasks)
    made.lost(take(made).shard_id, "died", at_fault=True, is_committed=False)
    order = [take(made) for _ in range(11)]
    assert order == [*tasks[1:11], tasks[0]]


def test_what_is_on_trial_has_its_worker_for_itself() -> None:
    suspect, *others = tasks = shards(60, 2)
    made = schedule(tasks)
    while (task := take(made)) is not suspect or made._running[suspect.shard_id].num_deaths < 2:
        if task is suspect:
            made.lost(task.shard_id, "died", at_fault=True, is_committed=False)
        else:
            made.done(task.shard_id)
    assert not made.is_on_trial(suspect.shard_id)
    made.lost(suspect.shard_id, "died", at_fault=True, is_committed=False)
    assert made.next(is_idle=False) is None
    halves = [take(made), take(made)]
    assert [names(half) for half in halves] == [["0.0"], ["0.1"]]
    assert all(made.is_on_trial(half.shard_id) for half in halves)
    assert made.next(is_idle=False) in others


def test_deaths_with_successes_between_them_do_not_stop_the_job() -> None:
    tasks = shards(100, 1)
    made = schedule(tasks)
    lost = set()
    for number in range(60):
        task = take(made)
        if number % 2:
            made.done(task.shard_id)
        else:
            lost.add(task.shard_id)
            made.lost(task.shard_id, "died", at_fault=True, is_committed=False)
    assert len(lost) > 20
    assert made.stopped is None


def test_texts_that_kill_workers_are_left_pending() -> None:
    task = SharedTextTask(shard_id="t", captions=(Caption(caption="a", id="1"), Caption(caption="b", id="2")))
    made = schedule([task])
    for _ in range(3):
        assert made.next() is task
        last = made.lost("t", "died", at_fault=True, is_committed=False)
    (left,) = last
    assert (left.key, left.num_members, left.cause) == ("t", 2, "killed 3 workers: died")
    assert left.example.endswith(", in shard t: killed 3 workers: died")
    assert (made.is_over, made.num_pending) == (True, 2)


def test_deaths_on_a_bad_node_are_taken_back_from_the_shards() -> None:
    task = shard("ab")
    made = schedule([task])
    for _ in range(5):
        assert take(made) == task
        origin = made.origin(task.shard_id)
        assert [type(event) for event in made.lost(task.shard_id, "bad node", at_fault=True, is_committed=False)] == [
            Retried
        ]
        made.forgive([origin])
    assert take(made) == task
    made.done(task.shard_id)
    assert made.is_over
