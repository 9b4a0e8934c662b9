"""Which shard is handed out next, and what follows when one is lost. Pure: no Ray, no clock but the one given.

A shard that was lost with its worker is handed out again under the same identity, so that it is committed once,
however often it is encoded. One that killed three workers is *on trial*: its samples go into two shards of their own,
each named by its members; what comes through is committed as it is, what kills a worker is halved again, until one clip
has killed a worker alone. So nothing waits in probation and nothing is committed twice; the price is some small shards,
which compaction merges.

A task on trial has its worker for itself: whoever shares a worker dies with it. And workers die for reasons of their
own. A shard that killed one waits until others were tried, so that broken workers show as many shards lost in a row,
and the job stops before clips are blamed. A clip is refused only when some shard came through since its own was first
lost; verdicts without such proof wait for it, and five of them stop the job.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from preprocess.events import Consequence, Convicted, Halved, LeftPending, Retried, Stopped
from preprocess.text_plan import SharedTextTask, TextTask, num_members
from shared.cache.identity import shard_id
from shared.cache.ledger import Refusal
from shared.clips.plan import SampleTask, ShardTask

Task = ShardTask | TextTask | SharedTextTask

MAX_DEATHS = 3
"""Workers that a shard may kill before it is on trial."""
MAX_NODE_LOSSES = 10
"""How often a shard is handed out again whose node was lost: a clip may exhaust the memory of a host."""
MAX_ATTEMPTS = 7
"""How often a shard is tried that fails by something that passes: for two minutes."""
FAILURES_A_WORKER = 5
LEAST_FAILURES = 10
"""So many different shards that fail in a row for each worker, and in all, none encoded between them, stop the job."""
MAX_UNPROVEN = 5
"""Verdicts in a row, nothing encoded between them, that stop the job."""
LONGEST_DELAY = 60.0
_LEAST_WAITING = 16
_LONGEST_CAUSE = 300


@dataclass(kw_only=True, slots=True)
class _Entry:
    """A task that was handed out at least once and is not settled."""

    task: Task
    origin: str
    """The planned shard that it is, or is a part of."""
    num_done_before: int
    """Shards that had come through when the origin was first lost."""
    num_killed: int = 0
    """Workers that this task and those that it is a part of killed."""
    num_deaths: int = 0
    """Of these, by this task."""
    num_node_losses: int = 0
    num_attempts: int = 0
    is_on_trial: bool = False


class Schedule:
    """The tasks of one pass over the work. Keys are the tasks' ``shard_id``. Not safe with threads.

    The tasks are made one after another, each when it is handed out; what is kept are those that run or failed.

    Args:
        tasks: In the order in which they are handed out; their keys differ.
        num_members: Samples or texts of all tasks.
        streams: What shards of samples hold, for the identities of halves.
        num_workers: Actors that encode, at least 1; the engine keeps the attribute up to date.
        clock: Gives seconds.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        num_members: int,
        streams: Collection[str],
        num_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_workers = num_workers
        self.num_members = num_members
        self.stopped: str | None = None
        """Why the job stops, in one line, or None."""
        self.left: list[LeftPending] = []
        """Shards that were given up; they stay pending."""
        self.pending_clips: dict[str, str] = {}
        """Samples that failed by something that passes, in shards that were committed without them, and its cause."""
        self._tasks, self._streams, self._clock = tasks, tuple(streams), clock
        self._position = 0
        self._num_handed_out = 0
        self._running: dict[str, _Entry] = {}
        self._trials: deque[_Entry] = deque()
        self._urgent: deque[_Entry] = deque()
        self._suspects: deque[tuple[int, _Entry]] = deque()
        """With the number of hand-outs before which they wait, ascending."""
        self._waiting: list[tuple[float, int, _Entry]] = []
        """A heap: when they are due, and a number that makes entries differ."""
        self._num_waited = 0
        self._num_done = 0
        self._failed_in_a_row: set[str] = set()
        self._unproven: list[Convicted] = []
        self._num_committed = self._num_refused = 0
        self._deadline: float | None = None

    # What the engine asks.

    def next(self, *, is_idle: bool = True) -> Task | None:
        """Returns what to hand out now, or None: see :meth:`wait_seconds` and :attr:`is_over`.

        Args:
            is_idle: Whether the worker that asks has no other task. What is on trial goes to such a worker only, and
                while it waits for one, the others get nothing: give it nothing else, see :meth:`is_on_trial`.
        """
        if self.stopped or self.is_draining:
            return None
        while self._waiting and self._waiting[0][0] <= self._clock():
            self._hand_out_soon(heappop(self._waiting)[2])
        entry = None if self._trials and not is_idle else self._choose()
        if entry is None:
            return None
        self._num_handed_out += 1
        self._running[entry.task.shard_id] = entry
        return entry.task

    def wait_seconds(self) -> float | None:
        """Returns in how many seconds a task that backs off is due, or None if there is none."""
        return max(self._waiting[0][0] - self._clock(), 0.0) if self._waiting else None

    def is_on_trial(self, key: str) -> bool:
        """Returns whether a running task must be alone on its worker, so that only it can be what kills it."""
        return self._running[key].is_on_trial

    def origin(self, key: str) -> str:
        """Returns the planned shard that a running task is, or is a part of."""
        return self._running[key].origin

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing will be handed out, or the deadline of :meth:`drain` has passed."""
        if self._deadline is not None and self._clock() >= self._deadline:
            return True
        if self._running:
            return False
        unstarted = self._position < len(self._tasks) or self._trials or self._urgent or self._suspects or self._waiting
        return bool(self.stopped) or self.is_draining or not unstarted

    @property
    def is_draining(self) -> bool:
        """Whether :meth:`drain` was called."""
        return self._deadline is not None

    @property
    def running(self) -> Collection[str]:
        """The keys of what is handed out and has no outcome yet."""
        return self._running.keys()

    @property
    def num_committed(self) -> int:
        """Members that are in the cache."""
        return self._num_committed

    @property
    def num_refused(self) -> int:
        """Members that are refused."""
        return self._num_refused

    @property
    def num_pending(self) -> int:
        """Members that are neither: given up, waiting, running or not begun."""
        return self.num_members - self.num_committed - self.num_refused

    # What the engine tells.

    def done(self, key: str, *, num_refused: int = 0, pending: Mapping[str, str] | None = None) -> list[Consequence]:
        """Takes note that a task was committed.

        Args:
            key: Of the task.
            num_refused: Members that were refused on the way.
            pending: Samples that are not in the shard since their clips failed by something that passes, with the
                cause. :attr:`pending_clips` collects them: plan once more when the pass is over.

        Returns:
            Verdicts that this proves, or that too much fails.
        """
        entry = self._running.pop(key)
        pending = pending or {}
        self.pending_clips.update(pending)
        self._num_refused += num_refused
        num_committed = _size(entry.task) - num_refused - len(pending)
        self._num_committed += num_committed
        if pending and not num_committed:  # a store of clips that does not answer, say
            self._failed_in_a_row.add(entry.origin)
            return self._stop_if_all_fail(f"none of its clips could be had: {next(iter(pending.values()))}")
        self._num_done += 1
        self._failed_in_a_row.clear()
        return self._proven()

    def lost(
        self,
        key: str,
        cause: str,
        *,
        at_fault: bool,
        is_committed: bool,
        num_refused: int = 0,
        pending: Mapping[str, str] | None = None,
    ) -> list[Consequence]:
        """Takes note that a task's worker is gone.

        Args:
            key: Of the task.
            cause: For people, without credentials.
            at_fault: Whether the task may have killed it; not if its node was lost or preempted, or if the task had
                not begun.
            is_committed: Whether the task's fragment is in the index after all, which the engine looks up *after* it
                has made sure that the worker is dead: the halves of a committed shard would be its samples once more.
            num_refused: If it is committed, as for :meth:`done`.
            pending: Likewise.

        Returns:
            What follows.
        """
        if is_committed:
            return self.done(key, num_refused=num_refused, pending=pending)
        entry = self._running.pop(key)
        cause = _short(cause)
        if not at_fault:
            entry.num_node_losses += 1
            if entry.num_node_losses >= MAX_NODE_LOSSES:
                return self._give_up(entry, f"its node was lost {entry.num_node_losses} times: {cause}")
            self._hand_out_soon(entry)
            return [Retried(key=key, cause=cause, delay_seconds=0.0)]
        if not entry.num_killed:
            entry.num_done_before = self._num_done
        entry.num_killed += 1
        entry.num_deaths += 1
        self._failed_in_a_row.add(entry.origin)
        return [*self._after_death(entry, cause), *self._stop_if_all_fail(cause)]

    def failed(self, key: str, cause: str) -> list[Consequence]:
        """Takes note that a task failed by something that passes: throttling, a time-out, a lost connection.

        It is handed out again after 2, 4, 8, ... 60 s, and given up after :data:`MAX_ATTEMPTS`.
        """
        entry = self._running.pop(key)
        cause = _short(cause)
        entry.num_attempts += 1
        if entry.num_attempts >= MAX_ATTEMPTS:
            self._failed_in_a_row.add(entry.origin)
            return [
                *self._give_up(entry, f"failed {entry.num_attempts} times: {cause}"),
                *self._stop_if_all_fail(cause),
            ]
        delay = min(2.0**entry.num_attempts, LONGEST_DELAY)
        self._num_waited += 1
        heappush(self._waiting, (self._clock() + delay, self._num_waited, entry))
        return [Retried(key=key, cause=cause, delay_seconds=delay)]

    def forgive(self, origins: Collection[str]) -> None:
        """Takes back the deaths of shards that wait, by the shards that were planned: their node was to blame."""
        self._failed_in_a_row.difference_update(origins)
        forgiven = [entry for _, entry in self._suspects if entry.origin in origins]
        self._suspects = deque(waiting for waiting in self._suspects if waiting[1].origin not in origins)
        for entry in forgiven:
            entry.num_killed = entry.num_deaths = 0
            self._hand_out_soon(entry)

    def drain(self, seconds: float) -> None:
        """Hands out nothing more; what runs may finish for so many seconds. The earliest deadline counts."""
        deadline = self._clock() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def finish(self) -> list[Consequence]:
        """Returns the verdicts that nothing proved, unless the job was stopped: then the clips stay pending.

        Call it once, when :attr:`is_over`.
        """
        return [] if self.stopped or self.is_draining else self._proven()

    # How it decides.

    @property
    def _most_failures(self) -> int:
        return max(LEAST_FAILURES, FAILURES_A_WORKER * self.num_workers)

    def _hand_out_soon(self, entry: _Entry) -> None:
        (self._trials if entry.is_on_trial else self._urgent).append(entry)

    def _choose(self) -> _Entry | None:
        if self._trials or self._urgent:
            return (self._trials or self._urgent).popleft()
        has_fresh = self._position < len(self._tasks)
        if self._suspects and (self._suspects[0][0] <= self._num_handed_out or not has_fresh):
            return self._suspects.popleft()[1]
        # While many back off, the store is in trouble: more of the same would fail too.
        if not has_fresh or len(self._waiting) >= max(_LEAST_WAITING, 2 * self.num_workers):
            return None
        task = self._tasks[self._position]
        self._position += 1
        return _Entry(task=task, origin=task.shard_id, num_done_before=self._num_done)

    def _after_death(self, entry: _Entry, cause: str) -> list[Consequence]:
        task, key = entry.task, entry.task.shard_id
        if not entry.is_on_trial and entry.num_deaths < MAX_DEATHS:
            self._suspects.append((self._num_handed_out + self._most_failures, entry))
            return [Retried(key=key, cause=cause, delay_seconds=0.0)]
        if not isinstance(task, ShardTask):  # Texts cannot be refused; what kills here is no caption.
            return self._give_up(entry, f"killed {entry.num_killed} workers: {cause}")
        if len(task.samples) == 1 and entry.is_on_trial:
            return self._convict(entry, task.samples[0], cause)
        if len(task.samples) == 1:  # It may have died with a neighbour.
            entry.is_on_trial = True
            self._hand_out_soon(entry)
            return [Retried(key=key, cause=cause, delay_seconds=0.0)]
        middle = len(task.samples) // 2
        halves = [self._part(task, samples) for samples in (task.samples[:middle], task.samples[middle:])]
        for half in halves:
            self._hand_out_soon(replace(entry, task=half, num_deaths=0, num_attempts=0, is_on_trial=True))
        return [Halved(key=key, cause=cause, halves=(halves[0].shard_id, halves[1].shard_id))]

    def _part(self, task: ShardTask, samples: tuple[SampleTask, ...]) -> ShardTask:
        identity = shard_id((sample.sample for sample in samples), streams=self._streams, generation=task.generation)
        return replace(task, shard_id=identity, samples=samples)

    def _convict(self, entry: _Entry, sample: SampleTask, cause: str) -> list[Consequence]:
        assert isinstance(entry.task, ShardTask)
        refusal = Refusal(
            source=sample.source,
            source_version=sample.source_version,
            bucket=str(entry.task.bucket),
            sample=sample.sample,
            reason="kills_workers",
            detail=f"{entry.num_killed} workers died of its shard, the last of this clip alone: {cause}",
        )
        verdict = Convicted(key=entry.task.shard_id, refusal=refusal)
        if self._num_done > entry.num_done_before:
            self._num_refused += 1
            return [verdict]
        self._unproven.append(verdict)
        if len(self._unproven) < MAX_UNPROVEN:
            return []
        return self._stop(
            f"{len(self._unproven)} clips in a row killed their workers and nothing was encoded between them, the last "
            f"{sample.source!r}: {cause}: expected workers that live: look at nodes, memory and drivers, then run "
            "again; none of these clips was refused"
        )

    def _proven(self) -> list[Consequence]:
        proven, self._unproven = self._unproven, []
        self._num_refused += len(proven)
        return list(proven)

    def _give_up(self, entry: _Entry, cause: str) -> list[Consequence]:
        example = f"{_first(entry.task)}, in shard {entry.task.shard_id[:8]}: {cause}"
        left = LeftPending(key=entry.task.shard_id, num_members=_size(entry.task), cause=cause, example=example)
        self.left.append(left)
        return [left]

    def _stop_if_all_fail(self, cause: str) -> list[Consequence]:
        if len(self._failed_in_a_row) < self._most_failures:
            return []
        return self._stop(
            f"{len(self._failed_in_a_row)} shards in a row failed and none was encoded between them, the last by "
            f"{cause}: expected workers that live and a store that answers: look at nodes, drivers and the store, then "
            "run again: it goes on where this job was"
        )

    def _stop(self, message: str) -> list[Consequence]:
        if self.stopped is not None:
            return []
        self.stopped = message
        return [Stopped(message=message)]


def _size(task: Task) -> int:
    return len(task.samples) if isinstance(task, ShardTask) else num_members(task)


def _first(task: Task) -> str:
    """Returns which clip or text is the first of a task, for people."""
    if isinstance(task, ShardTask):
        return task.samples[0].source
    if isinstance(task, TextTask):
        return f"the texts of sample {task.samples[0].sample[:8]}"
    return f"the text {task.captions[0].caption!r}"


def _short(cause: str) -> str:
    line = " ".join(cause.split())
    return line if len(line) <= _LONGEST_CAUSE else f"{line[:_LONGEST_CAUSE]}..."
