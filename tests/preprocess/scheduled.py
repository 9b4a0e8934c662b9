"""Schedules for tests, and workers that encode what they hand out, and die of guilty clips or by chance."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from preprocess.events import Convicted
from preprocess.schedule import Schedule, Task
from shared.cache.identity import shard_id
from shared.clips.plan import SampleTask, ShardTask
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
