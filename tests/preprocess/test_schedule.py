"""Who gets which shard, and what becomes of shards whose workers die: the driver's decisions, without workers."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from preprocess.events import Convicted, Halved, LeftPending, Retried, Stopped
from preprocess.schedule import MAX_ATTEMPTS, MAX_NODE_LOSSES, Schedule, Task
from preprocess.text_plan import SharedTextTask
from shared.cache.identity import shard_id
from shared.clips.plan import SampleTask, ShardTask
from shared.clips.texts import Caption
from shared.spec import Bucket

BUCKET = Bucket(16, 256, 256)
STREAMS = ("latent", "text.t5")


def sample(name: str) -> SampleTask:
    """Returns a sample of which the schedule needs the identity and the source."""
    known: dict[str, Any] = {"sample": name, "source": f"{name}.mp4", "source_version": "1", "captions": ("a",)}
    others = {f.name: None for f in fields(SampleTask) if f.name not in (*known, "columns")}
    return SampleTask(**known, **others)


def shard(names: Sequence[str], generation: int = 0) -> ShardTask:
    """Returns the shard that is planned for these samples."""
    identity = shard_id(names, streams=STREAMS, generation=generation)
    return ShardTask(shard_id=identity, bucket=BUCKET, samples=tuple(map(sample, names)), generation=generation)


class Clock:
    """Stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def schedule(tasks: Sequence[Task], *, num_workers: int = 1, clock: Clock | None = None) -> Schedule:
    """Returns the schedule of these tasks."""
    size = sum(len(task.samples) if isinstance(task, ShardTask) else len(task.captions) for task in tasks)
    return Schedule(tasks, num_members=size, streams=STREAMS, num_workers=num_workers, clock=clock or Clock())


def take(made: Schedule) -> ShardTask:
    """Returns what is handed out, which must be a shard of samples."""
    task = made.next()
    assert isinstance(task, ShardTask)
    return task


def names(task: Task) -> list[str]:
    """Returns the samples of a shard."""
    assert isinstance(task, ShardTask)
    return [part.sample for part in task.samples]


@dataclass
class Cluster:
    """Workers that encode what a schedule hands out, and die of guilty clips or by chance."""

    made: Schedule
    clock: Clock
    rng: random.Random
    killers: frozenset[str] = frozenset()
    chance_death: float = 0.0
    chance_node: float = 0.0
    chance_failure: float = 0.0
    chance_after_commit: float = 0.0
    chance_pending: float = 0.0
    committed: Counter[str] = field(default_factory=Counter)
    """How often each sample is in the cache."""
    index: set[str] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    num_deaths: int = 0
    consequences: list[object] = field(default_factory=list)

    def run(self, most_steps: int = 200_000) -> None:
        """Goes on until the schedule is over."""
        workers: list[list[Task]] = [[] for _ in range(self.made.num_workers)]
        for _ in range(most_steps):
            if self.made.is_over:
                self.note(self.made.finish())
                return
            for worker in sorted(workers, key=len):
                self.fill(worker)
            busy = [worker for worker in workers if worker]
            if not busy:
                wait = self.made.wait_seconds()
                assert wait is not None, "nothing runs, nothing waits, and it is not over"
                self.clock.now += wait
                continue
            self.clock.now += 0.5
            self.end(self.rng.choice(busy))
        raise AssertionError("the schedule does not end")

    def fill(self, worker: list[Task]) -> None:
        """Gives a worker up to two tasks."""
        while len(worker) < 2 and not any(self.made.is_on_trial(task.shard_id) for task in worker):
            if (task := self.made.next(is_idle=not worker)) is None:
                return
            worker.append(task)

    def end(self, worker: list[Task]) -> None:
        """Lets a worker die, or come to the end of a task."""
        luck = self.rng.random
        if any(self.killers & set(names(task)) for task in worker) or luck() < self.chance_death:
            self.num_deaths += 1
            for task in worker:
                self.note(self.made.lost(task.shard_id, "SIGSEGV", at_fault=True, is_committed=False))
            worker.clear()
            return
        task = worker.pop(self.rng.randrange(len(worker)))
        key = task.shard_id
        if luck() < self.chance_node:
            self.note(self.made.lost(key, "node died", at_fault=False, is_committed=False))
        elif luck() < self.chance_failure:
            self.note(self.made.failed(key, "SlowDown"))
        else:
            pending = {name: "timed out" for name in names(task) if luck() < self.chance_pending}
            self.commit(task, pending)
            if luck() < self.chance_after_commit:
                self.note(self.made.lost(key, "SIGKILL", at_fault=True, is_committed=True, pending=pending))
            else:
                self.note(self.made.done(key, pending=pending))

    def commit(self, task: Task, pending: dict[str, str]) -> None:
        """Puts a shard into the index, unless one of its identity is there."""
        if task.shard_id not in self.index:
            self.index.add(task.shard_id)
            self.committed.update(set(names(task)) - pending.keys())

    def note(self, consequences: Sequence[object]) -> None:
        """Keeps what the schedule says, and the ledger."""
        self.consequences.extend(consequences)
        for consequence in consequences:
            if isinstance(consequence, Convicted):
                assert consequence.refusal.sample is not None
                self.refused[consequence.refusal.sample] += 1


def shards(num_shards: int, num_samples: int) -> list[ShardTask]:
    """Returns shards of so many samples each."""
    return [shard([f"{i}.{j}" for j in range(num_samples)]) for i in range(num_shards)]


def all_names(tasks: Sequence[ShardTask]) -> set[str]:
    """Returns the samples of all shards."""
    return {name for task in tasks for name in names(task)}


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
