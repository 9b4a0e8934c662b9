"""The job on Ray: probing and decoding as tasks, encoding in actors. The only file that knows Ray.

An actor takes a whole shard, keeps a few decoded clips ahead of the encoders, and commits the shard itself; so a shard
is the unit of retry, and what crashes a decoder costs one clip. Actors hold no CPU of Ray's count: those feed the
decoders.
"""

import os
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from tqdm import tqdm

from preprocess.config import PreprocessConfig
from preprocess.decode import decode_sample, probe_clip, refuse
from preprocess.plan import ShardTask
from preprocess.report import JobReport
from preprocess.text_plan import SharedTextTask, TextTask, num_members
from preprocess.work import Work, find_work
from shared.cache.card import write_card
from shared.cache.dataset import Cache, CommittedShard, Provenance, check_is_cache_or_empty
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.removal import remove_samples
from shared.cache.rows import Place
from shared.errors import InputError
from shared.media.manifest import Clip, Manifest, read_manifest
from shared.media.probe import Probe
from shared.stores.open import open_store

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entry point of a submitted job, and nowhere else."""
_PROBE_BATCH = 16
_START_SECONDS = 1800
"""For workers to be placed and to load the encoders, downloads included."""
_MAX_ATTEMPTS = 3
"""How often a shard is tried whose worker died."""
_LOSSES = (OutOfMemoryError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
"""Of a worker, for reasons that need not lie in its clip."""
_FAILURES = (WorkerCrashedError, RayTaskError, *_LOSSES)

Task = ShardTask | TextTask | SharedTextTask

_probe = ray.remote(num_cpus=1, max_retries=1)(lambda clips: [probe_clip(source, path) for source, path in clips])
_decode = ray.remote(num_cpus=1, max_retries=1)(decode_sample)


def _explain(error: Exception) -> tuple[str, str]:
    """Returns the ledger's reason and detail for a probe or a decoder that failed without saying why."""
    if isinstance(error, _LOSSES):
        return "decoder_lost", f"its worker was lost: {type(error).__name__}"
    if isinstance(error, RayTaskError):
        return "not_decodable", f"{type(error.cause).__name__}: {error.cause}"
    return "decoder_crashed", f"its worker died: {type(error).__name__}"


class _EncodeActor:
    """T5 and the VAE on one GPU, or on a CPU where the cluster has no GPU."""

    def load(self, config: PreprocessConfig) -> Provenance:
        """Loads the encoders and returns the provenance of both streams."""
        from preprocess.encode import Encoders  # torch is loaded here, not in the driver and the decoders

        self._decode_ahead = config.decode_ahead
        self._encoders = Encoders(config)
        return self._encoders.provenance()

    def check_output(self, output: str, witness: str) -> None:
        """Raises :class:`InputError` if this node does not see the file that the driver wrote into the cache."""
        if open_store(output).size(witness) is None:
            raise InputError(
                f"--output {output}: node {ray.util.get_node_ip_address()} does not see what the driver wrote "
                "there: expected a file system that every node shares, or an object store"
            )

    def encode_null_caption(self, output: str) -> None:
        """Stores the embedding of the empty caption."""
        self._encoders.encode_null_caption(open_store(output))

    def encode(
        self, output: str, task: Task, shared: Mapping[str, Place] | None
    ) -> Iterator[Refusal | CommittedShard | None]:
        """Encodes and commits one shard; yields None or a refusal after each sample, and the shard at the end."""
        store = open_store(output)
        if isinstance(task, ShardTask):
            yield from self._encoders.encode_shard(store, task, self._decoded(task), shared)
        elif isinstance(task, TextTask):
            yield self._encoders.encode_texts(store, task, shared)
        else:
            yield self._encoders.encode_shared_texts(store, task)

    def _decoded(self, task: ShardTask) -> Iterator[np.ndarray | Refusal]:
        """Yields the frames of each sample, in order, with a few being decoded ahead."""
        waiting: deque[Any] = deque()
        upcoming = iter(task.samples)
        for sample in task.samples:
            while len(waiting) < self._decode_ahead and (following := next(upcoming, None)) is not None:
                waiting.append(_decode.remote(following, task.bucket))
            try:
                yield ray.get(waiting.popleft())
            except _FAILURES as error:
                yield refuse(sample, task.bucket, *_explain(error))


_encode_actor = ray.remote(num_cpus=0, max_restarts=0)(_EncodeActor)


def run_job(config: PreprocessConfig) -> JobReport:
    """Runs stage 1 and returns its figures.

    Raises:
        InputError: for what the user gave: manifest, models, buckets, output.
    """
    config = _placed(config.resolved())
    manifest = read_manifest(config.manifest, columns=config.column_mapping(), ignore=config.ignore_columns)
    check_is_cache_or_empty(open_store(config.output))
    _check_cluster_answers(config.address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(address=config.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers ({error}): start one, or leave out --address and RAY_ADDRESS"
        ) from None
    try:
        return _run(config, manifest)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    finally:
        ray.shutdown()


def _check_cluster_answers(address: str) -> None:
    """Raises :class:`InputError` if nobody listens at HOST:PORT; Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): start one, or leave out --address and RAY_ADDRESS"
        ) from None


def _placed(config: PreprocessConfig) -> PreprocessConfig:
    """Returns the configuration with paths that mean the same in every worker.

    Inside a submitted job each worker's current folder is its own copy of the job's working directory: what is read may
    be given relative to it, what is written there would be lost.
    """
    if _JOB_VARIABLE in os.environ:
        if "://" not in config.output and not Path(config.output).is_absolute():
            raise InputError(
                f"--output {config.output}: inside a Ray job the current folder is a temporary copy: "
                "expected an absolute path on a file system that every node shares"
            )
        return config
    output = config.output if "://" in config.output else str(Path(config.output).absolute())
    return replace(config, manifest=config.manifest.absolute(), output=output)


def _run(config: PreprocessConfig, manifest: Manifest) -> JobReport:
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    num_workers = config.workers or max(num_gpus, 1)
    if num_gpus and num_workers > num_gpus:
        raise InputError(f"--workers {num_workers}: found {num_gpus} GPUs in the cluster: expected at most that many")
    pool = _Pool(config, num_workers, num_gpus)
    probed, refusals = ([], []) if config.only_texts else _probe_all(manifest.clips)
    cache = pool.open_cache()
    work = find_work(config, manifest, probed, cache)
    rows = [Refusal(source=row.source, reason=row.reason, detail=row.detail) for row in manifest.refused]
    refusals = [*rows, *refusals, *work.refusals]
    write_ledger(cache.store, refusals)
    num_removed = remove_samples(cache, work.stale) if config.prune else 0
    started = time.monotonic()
    committed, refused_now = _encode_all(pool, work, cache)
    seconds = time.monotonic() - started
    write_card(cache)
    reasons = Counter(refusal.reason for refusal in [*refusals, *refused_now])
    if work.num_refused_before:
        reasons["refused by an earlier run"] = work.num_refused_before
    return JobReport(
        num_rows=manifest.num_rows,
        num_clips=len(manifest.clips),
        num_encoded=sum(shard.num_samples for shard in committed["samples"] if shard.created),
        num_by_others=sum(shard.num_samples for shard in committed["samples"] if not shard.created),
        num_committed_before=work.num_committed,
        num_new_texts=sum(shard.num_samples for shard in committed["texts"]),
        num_shared_texts=sum(shard.num_samples for shard in committed["shared"]),
        num_stale=len(work.stale),
        num_removed=num_removed,
        refused=reasons,
        num_bytes=sum(shard.num_bytes for shards in committed.values() for shard in shards if shard.created),
        seconds=seconds,
    )


def _encode_all(pool: "_Pool", work: Work, cache: Cache) -> tuple[dict[str, list[CommittedShard]], list[Refusal]]:
    """Encodes what is to be encoded: texts that samples share first, since the others name them."""
    shared: Mapping[str, Place] | None = None
    committed: dict[str, list[CommittedShard]] = {}
    committed["shared"], _ = pool.encode("texts", work.shared_texts, cache)
    if work.share_text:
        shared = cache.shared_texts(work.stream)
    committed["texts"], _ = pool.encode("texts", work.texts, cache, shared)
    committed["samples"], refused = pool.encode("encoding", work.shards, cache, shared, work.text_ids)
    return committed, refused


def _progress(total: int, what: str, unit: str) -> tqdm:
    """Returns a progress bar; where nobody watches a terminal, a line every ten seconds."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"{what:<8}",
        unit=unit,
        dynamic_ncols=watched,
        mininterval=0.1 if watched else 10,
        disable=not total,
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    )


def _probe_all(clips: Sequence[Clip]) -> tuple[list[tuple[Clip, Probe]], list[Refusal]]:
    """Returns the probed clips, in order, and the refusals of the others. A crash costs one clip."""
    facts: dict[int, Probe | Refusal] = {}
    queue = deque(range(start, min(start + _PROBE_BATCH, len(clips))) for start in range(0, len(clips), _PROBE_BATCH))
    running: dict[Any, range] = {}
    max_running = 4 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    with _progress(len(clips), "probing", "clip") as bar:
        while queue or running:
            while queue and len(running) < max_running:
                batch = queue.popleft()
                running[_probe.remote([(clips[i].source, clips[i].path) for i in batch])] = batch
            ready, _ = ray.wait(list(running))
            batch = running.pop(ready[0])
            try:
                facts.update(zip(batch, ray.get(ready[0]), strict=True))
                bar.update(len(batch))
            except _FAILURES as error:
                if len(batch) > 1:
                    queue.extend(range(i, i + 1) for i in batch)
                    continue
                reason, detail = _explain(error)
                facts[batch[0]] = Refusal(source=clips[batch[0]].source, reason=reason, detail=detail)
    outcomes = [(clip, facts[i]) for i, clip in enumerate(clips)]
    return (
        [(clip, outcome) for clip, outcome in outcomes if isinstance(outcome, Probe)],
        [outcome for _, outcome in outcomes if isinstance(outcome, Refusal)],
    )


class _Pool:
    """The encoding actors, as the driver sees them."""

    def __init__(self, config: PreprocessConfig, num_workers: int, num_gpus: int) -> None:
        self._config = config
        self._num_gpus = 1 if num_gpus else 0
        self._started = [self._start() for _ in range(num_workers)]
        self._output = config.output

    def _start(self) -> tuple[Any, Any]:
        """Returns a new actor and the provenance that its loading will give."""
        actor = _encode_actor.options(num_gpus=self._num_gpus).remote()
        return actor, actor.load.remote(self._config)

    def open_cache(self) -> Cache:
        """Returns the cache, made if there was none, after every actor has loaded the same encoders and seen it."""
        loading = [provenance for _, provenance in self._started]
        ready, waiting = ray.wait(loading, num_returns=len(loading), timeout=_START_SECONDS)
        if waiting:
            raise InputError(
                f"{len(ready)} of {len(loading)} workers started within {_START_SECONDS} s: expected all: "
                "are the GPUs taken by others? Choose fewer by --workers"
            )
        provenances = ray.get(loading)
        cache = Cache.open_or_create(self._output, provenances[0])
        for provenance in provenances[1:]:
            cache.require(provenance)
        witness = f".tmp-{secrets.token_hex(8)}"
        cache.store.write(witness, b"")
        try:
            ray.get([actor.check_output.remote(self._output, witness) for actor, _ in self._started])
        finally:
            cache.store.delete(witness)
        ray.get(self._started[0][0].encode_null_caption.remote(self._output))
        return cache

    def encode(
        self,
        what: str,
        tasks: Sequence[Task],
        cache: Cache,
        shared: Mapping[str, Place] | None = None,
        text_ids: Mapping[str, str] | None = None,
    ) -> tuple[list[CommittedShard], list[Refusal]]:
        """Encodes all tasks into the cache. Returns what was committed and what was refused on the way.

        Args:
            what: For the progress bar.
            tasks: What to encode.
            cache: Where to.
            shared: Where texts lie that samples share, by their identities.
            text_ids: The identities of captions, where samples name shared texts.

        Raises:
            RayActorError: if a shard's worker died three times.
        """
        queue = deque(tasks)
        attempts: Counter[str] = Counter()
        idle = [actor for actor, _ in self._started]
        running: dict[Any, _Run] = {}
        committed: list[CommittedShard] = []
        refused: list[Refusal] = []
        with _progress(sum(map(_num_members, tasks)), what, "sample" if what == "encoding" else "text") as bar:
            while queue or running:
                while queue and idle:
                    actor, task = idle.pop(), queue.popleft()
                    events = actor.encode.options(num_returns="streaming").remote(
                        self._output, task, _places(task, shared, text_ids or {})
                    )
                    running[events] = _Run(actor=actor, task=task)
                ready, _ = ray.wait(list(running))
                run = running[ready[0]]
                try:
                    run.events.append(ray.get(next(ready[0])))
                    bar.update(run.num_done - run.num_shown)
                    run.num_shown = run.num_done
                except StopIteration:
                    del running[ready[0]]
                    idle.append(run.actor)
                    committed.extend(event for event in run.events if isinstance(event, CommittedShard))
                    refused.extend(event for event in run.events if isinstance(event, Refusal))
                except RayActorError:
                    del running[ready[0]]
                    bar.update(-run.num_shown)
                    attempts[run.task.shard_id] += 1
                    if attempts[run.task.shard_id] == _MAX_ATTEMPTS:
                        raise
                    queue.append(run.task)
                    ray.kill(run.actor)  # it may only have been out of reach; its GPU is wanted
                    actor, provenance = self._start()
                    cache.require(ray.get(provenance))
                    idle.append(actor)
        return committed, refused


@dataclass(kw_only=True, slots=True)
class _Run:
    """A shard that an actor is encoding."""

    actor: Any
    task: Task
    events: list[Refusal | CommittedShard | None] = field(default_factory=list)
    num_shown: int = 0
    """Samples that the progress bar counts."""

    @property
    def num_done(self) -> int:
        """Samples that are encoded or refused."""
        if not isinstance(self.task, ShardTask):
            return _num_members(self.task) if self.events else 0
        return sum(not isinstance(event, CommittedShard) for event in self.events)


def _places(task: Task, shared: Mapping[str, Place] | None, text_ids: Mapping[str, str]) -> dict[str, Place] | None:
    """Returns where the shared texts of one task lie."""
    if shared is None:
        return None
    if isinstance(task, ShardTask):
        captions = (caption for sample in task.samples for caption in sample.captions)
        ids = {text_ids[caption] for caption in captions if caption in text_ids}
    elif isinstance(task, TextTask):
        ids = {text.id for sample in task.samples for text in sample.captions}
    else:
        ids = set()
    return {identity: shared[identity] for identity in ids}


def _num_members(task: Task) -> int:
    return len(task.samples) if isinstance(task, ShardTask) else num_members(task)
