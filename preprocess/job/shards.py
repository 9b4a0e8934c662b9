"""A pass over shards: handed out to the workers, watched, handed out again when a worker is lost."""

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from preprocess.events import Committed, Convicted, Draining, Refused, Retried, Stopped
from preprocess.job import cluster
from preprocess.job.member import Member
from preprocess.job.patience import patiently
from preprocess.job.pool import Pool
from preprocess.job.run import Run, frame_bytes_of
from preprocess.liveness import Stuck
from preprocess.messages import ShardNews
from preprocess.progress import Phase
from preprocess.schedule import Schedule, Task
from preprocess.tally import Tally
from preprocess.text_plan import TextIds, TextTask, num_members
from preprocess.watch import Watch
from shared.cache.dataset import Cache, CommittedShard
from shared.cache.fragments import fragment_path, read_fragment, read_record
from shared.cache.layout import DATASET_FILE
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.shared_texts import SharedTexts
from shared.clips.decode import Postponed
from shared.clips.plan import ShardTask
from shared.errors import InputError
from shared.stores.store import StoreBusyError, StoreFullError

if TYPE_CHECKING:
    from shared.cache.rows import Place  # loads torch

TOLD = "the job was told to end"
"""Why something is pending."""
_WAIT_SECONDS = 0.5
_GRACE_SECONDS = 20.0
"""For shards that run when the job is told to end."""


class ShardPass:
    """Encodes tasks into a cache.

    Args:
        pool: Of workers.
        cache: Where to.
        watch: What people and the log see.
        tally: What the closing report counts.
        shared: Where texts lie that samples share, by their identities.
        text_ids: The identities of captions, where samples name shared texts.
    """

    def __init__(
        self,
        pool: Pool,
        cache: Cache,
        watch: Watch,
        tally: Tally,
        *,
        shared: SharedTexts | None = None,
        text_ids: TextIds | None = None,
    ) -> None:
        self._pool, self._cache, self._watch, self._tally = pool, cache, watch, tally
        self._shared, self._text_ids = shared, text_ids
        self._runs: dict[Any, Run] = {}

    def run(self, what: str, tasks: Sequence[Task], num_members: int, unit: str) -> list[Postponed]:
        """Encodes all tasks and returns the samples that could not be had for now.

        Raises:
            InputError: if a worker finds something that the user must mend, or too much fails in a row.
        """
        self._schedule = Schedule(
            tasks,
            num_members=num_members,
            streams=self._pool.config.streams(),
            num_workers=max(len(self._pool.members), 1),
        )
        self._is_of_texts = unit == "text"
        self._postponed: list[Postponed] = []
        self._error: InputError | None = None
        with self._watch.progress.phase(what, num_members, unit) as phase:
            self._phase: Phase = phase
            while not self._schedule.is_over:
                self._turn()
        self._follow(self._schedule.finish())
        self._abandon()
        self._count_pending()
        if self._error is not None:
            raise self._error
        if self._schedule.stopped:
            raise InputError(self._schedule.stopped)
        return self._postponed

    def _count_pending(self) -> None:
        """Counts what is left for a later run, but for single clips, which are tried once more."""
        rest = self._schedule.num_pending - len(self._postponed)
        for left in self._schedule.left:
            self._tally.leave(left.cause, left.num_members, left.example)
            rest -= left.num_members
        if rest:
            self._tally.leave(self._schedule.stopped or TOLD, rest)

    def _turn(self) -> None:
        """Once around: what is due is handed out, what is new is read."""
        if self._watch.told_to_end and not self._schedule.is_draining:
            self._schedule.drain(_GRACE_SECONDS)
            self._watch.log(Draining(seconds=_GRACE_SECONDS))
        self._pool.grow()
        for member, stuck in self._pool.take_news():
            self._end_stuck(member, stuck)
        self._schedule.num_workers = max(len(self._takers()), 1)
        while (idle := self._idle()) is not None:
            task = self._schedule.next(is_idle=not idle.running)
            if task is None:
                break
            self._hand_out(idle, task)
        waiting = [*self._runs, *self._pool.waiting()]
        if waiting:
            ready, _ = ray.wait(waiting, timeout=_WAIT_SECONDS, fetch_local=False)
            if ready:
                ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
            for news in ready:
                if news in self._runs:
                    self._read(news)
        else:
            time.sleep(_WAIT_SECONDS)
        self._watch.progress.tick()

    def _idle(self) -> Member | None:
        """Returns the worker that has least to do, if one can take a shard; one on trial has its worker for itself."""
        free = [
            member
            for member in self._takers()
            if member.has_room(self._pool.decode_bytes) and not any(map(self._schedule.is_on_trial, member.running))
        ]
        return min(free, key=lambda member: len(member.running), default=None)

    def _takers(self) -> list[Member]:
        return self._pool.takers(texts=self._is_of_texts)

    def _hand_out(self, member: Member, task: Task) -> None:
        run = Run(task=task, member=member)
        member.running[task.shard_id] = frame_bytes_of(task)
        if isinstance(task, ShardTask) and member.role == "vae" and self._shared is None:
            captions = {text for sample in task.samples for text in sample.captions}
            run.text, figures, run.embeddings = self._pool.embed(captions)
            self._runs[figures] = run
        else:
            self._encode(run)

    def _encode(self, run: Run) -> None:
        news = run.member.actor.encode.options(num_returns="streaming").remote(
            self._cache.url, run.task, self._places(run.task), run.embeddings
        )
        run.text = run.embeddings = None
        self._runs[news] = run

    def _places(self, task: Task) -> "dict[str, Place] | None":
        """Returns where the shared texts of one task lie."""
        if self._shared is None:
            return None
        if isinstance(task, ShardTask):
            assert self._text_ids is not None
            ids = self._text_ids.of(caption for sample in task.samples for caption in sample.captions)
        elif isinstance(task, TextTask):
            ids = {text.id for sample in task.samples for text in sample.captions}
        else:
            ids = set()
        return self._shared.places(ids)

    def _read(self, reference: Any) -> None:
        """Reads one piece of news of a shard."""
        run = self._runs.get(reference)
        if run is None:  # it went with another shard of its worker
            return
        try:
            if run.text is not None:
                figures: ShardNews = ray.get(reference)
                self._tally.num_tokens += figures.num_tokens
                self._watch.timeline.add(run.text.name, figures.intervals)
                del self._runs[reference]
                self._encode(run)
                return
            news: ShardNews = ray.get(next(reference))
        except StopIteration:
            self._end(reference)
        except (RayActorError, RayTaskError, ObjectLostError) as error:
            self._fail(reference, error)
        else:
            self._take(run, news)

    def _take(self, run: Run, news: ShardNews) -> None:
        run.has_begun |= news.has_begun
        run.shard = news.shard or run.shard
        run.refusals += news.refusals
        run.postponed += news.postponed
        self._watch.timeline.add(run.member.name, news.intervals)
        self._tally.num_tokens += news.num_tokens
        done = news.num_encoded + len(news.refusals) + len(news.postponed)
        if not isinstance(run.task, ShardTask):
            done = num_members(run.task) if news.shard else 0
        run.num_done += done
        self._phase.add(done)
        has_encoded = news.num_encoded if isinstance(run.task, ShardTask) else done
        if has_encoded and (first := run.member.first_sample()) is not None:
            self._watch.encoded(first)

    def _end(self, reference: Any) -> None:
        """A shard's worker has said all."""
        run = self._drop(reference)
        assert run.shard is not None
        if run.shard.num_samples and not run.shard.created:  # of no samples, nothing is written
            run.postponed += self._unaccounted(run)
        self._committed(run, run.shard)
        self._follow(self._schedule.done(run.key, num_refused=len(run.refusals), pending=run.pending()))

    def _unaccounted(self, run: Run) -> list[Postponed]:
        """Returns the samples of a committed shard that are not in it, and of which no reason is known."""
        if not isinstance(run.task, ShardTask):
            return []
        rows = patiently(lambda: read_fragment(self._cache.store, fragment_path(run.key)))
        known = {*rows["sample"].to_pylist(), *(refusal.sample for refusal in run.refusals), *run.pending()}
        sources = {refusal.source for refusal in run.refusals}
        return [
            Postponed(sample=sample.sample, source=sample.source, reason="not_accounted_for", detail="not in its shard")
            for sample in run.task.samples
            if sample.sample not in known and sample.source not in sources
        ]

    def _committed(self, run: Run, shard: CommittedShard) -> None:
        self._pool.nodes.came_through(run.member.node_id)
        self._tally.commit(run.task, shard)
        self._refuse(run.refusals)
        self._postponed += run.postponed
        self._watch.log(
            Committed(
                key=run.key,
                shard=shard.shard,
                num_members=shard.num_samples,
                num_bytes=shard.num_bytes,
                worker=run.member.name,
                is_created=shard.created,
            )
        )

    def _refuse(self, refusals: Sequence[Refusal]) -> None:
        if refusals:
            self._tally.refuse(refusals)
            self._watch.log(Refused(reasons=Counter(refusal.reason for refusal in refusals)))

    def _fail(self, reference: Any, error: RayError) -> None:
        """A shard came to nothing: by the user, a store in trouble, a lost object, or a worker that died or must go."""
        run = self._runs[reference]
        cause = getattr(error, "cause", None)
        if isinstance(cause, StoreBusyError):
            self._drop(reference)
            self._phase.add(-run.num_done)
            self._follow(self._schedule.failed(run.key, str(cause)))
        elif isinstance(cause, StoreFullError) and self._has_full_disk_of_its_own(run.member):
            self._pool.exclude(run.member.node_id, str(cause))
            self._lose(run.member, str(cause), at_fault=False)
        elif isinstance(cause, InputError):  # the user's: shards that run may end in order, then it is raised
            self._lost(reference, str(cause), at_fault=False)
            self._error = self._error or cause
            self._schedule.drain(_GRACE_SECONDS)
        elif isinstance(error, ObjectLostError) or isinstance(cause, ObjectLostError):
            self._lost(reference, _line(error), at_fault=False)
        else:  # a GPU that failed, say, fails from now on: such a worker goes, as if it had died
            line = _line(error) if cause is None else f"{type(cause).__name__}: {_line(cause)}"
            is_at_fault = not isinstance(error, RayActorError) or cluster.is_at_fault(error)
            self._lose(
                run.text or run.member, line, at_fault=is_at_fault, guilty_shard=None if cause is None else reference
            )

    def _has_full_disk_of_its_own(self, member: Member) -> bool:
        """Returns whether a disk that is full must be the node's: the cache is on none, and others have room."""
        return self._cache.store.local_path(DATASET_FILE) is None and self._pool.has_other_nodes(member)

    def _end_stuck(self, member: Member, stuck: Stuck) -> None:
        """Ends a worker that does not get on.

        Raises:
            InputError: if it waits for frames, and so do all others: then there is nothing that decodes.
        """
        if stuck.kind == "frames" and not any(other.running for other in self._takers() if other is not member):
            raise InputError(
                f"{stuck.detail}: a decoding task asks for a CPU, and {cluster.what_there_is()}: free some, add nodes, "
                "or wait longer by --resource-timeout"
            )
        self._lose(member, stuck.detail, at_fault=stuck.kind == "worker")

    def _lose(self, guilty: Member, line: str, *, at_fault: bool, guilty_shard: Any = None) -> None:
        """Ends a worker, or takes note of its end; its shards are handed out again.

        Args:
            guilty: The worker.
            line: Why.
            at_fault: Whether it may have died of what it did.
            guilty_shard: The only shard that may be to blame; None: any that had begun.
        """
        self._watch.lost(guilty.name, guilty.node, line)
        self._pool.remove(guilty)  # it may only have been out of reach: from here on it is dead
        references = [other for other, its in self._runs.items() if guilty in (its.member, its.text)]
        blamed = {
            reference
            for reference in references
            if at_fault
            and guilty.role != "text"
            and guilty_shard in (None, reference)
            and self._runs[reference].has_begun
        }
        origins = {self._schedule.origin(self._runs[reference].key) for reference in blamed}
        for reference in references:
            self._lost(reference, line, at_fault=reference in blamed)
        if at_fault and self._pool.note_death(guilty, line, shards=origins):
            self._schedule.forgive(origins)

    def _lost(self, reference: Any, cause: str, *, at_fault: bool) -> None:
        run = self._drop(reference)
        shard = self._found_committed(run.task)
        if shard is None:
            self._phase.add(-run.num_done)
        else:
            run.postponed += self._unaccounted(run)
            self._committed(run, shard)
        self._follow(
            self._schedule.lost(
                run.key,
                cause,
                at_fault=at_fault and run.has_begun,
                is_committed=shard is not None,
                num_refused=len(run.refusals),
                pending=run.pending(),
            )
        )

    def _found_committed(self, task: Task) -> CommittedShard | None:
        """Returns what the index says of a shard whose worker died, perhaps after it had committed it."""
        store = self._cache.store
        if patiently(lambda: store.size(fragment_path(task.shard_id))) is None:
            return None
        record = patiently(lambda: read_record(store, task.shard_id))
        rows = patiently(lambda: read_fragment(store, fragment_path(task.shard_id)))
        return CommittedShard(
            shard=record.get("shard", ""), num_samples=len(rows), num_bytes=record.get("shard_bytes", 0), created=True
        )

    def _drop(self, reference: Any) -> Run:
        run = self._runs.pop(reference)
        del run.member.running[run.key]
        return run

    def _abandon(self) -> None:
        """Ends the workers of shards that run on after the grace; what they have not committed is not there."""
        for run in list(self._runs.values()):
            self._pool.remove(run.member)
        for reference in list(self._runs):
            self._drop(reference)

    def _follow(self, consequences: Sequence[Any]) -> None:
        for consequence in consequences:
            self._watch.log(consequence)
            if isinstance(consequence, Convicted):
                patiently(partial(write_ledger, self._cache.store, [consequence.refusal]))
                self._refuse([consequence.refusal])
                self._phase.add(1)
            elif isinstance(consequence, Retried):
                self._tally.num_retries += 1
            elif isinstance(consequence, Stopped):
                self._schedule.drain(0.0)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
