"""The encoding actor: T5 and the VAE on one GPU, or one of them, or both on a CPU where the cluster has no GPU.

Several shards are at hand at once: while one is being encoded, the next one's clips are being decoded and the one
before is compressed and committed. The actor holds no CPU of Ray's count: those feed the decoders.
"""

import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ray

from preprocess.config import PreprocessConfig
from preprocess.decode_ahead import DecodeAhead
from preprocess.job.decoding import Submitter, explainer
from preprocess.messages import Loaded, MicroBatch, Placed, Pulse, Role, ShardNews
from preprocess.schedule import Task
from preprocess.text_plan import SharedTextTask, TextTask
from shared.cache.dataset import CommittedShard
from shared.cache.ledger import Refusal
from shared.clips.decode import Postponed
from shared.clips.plan import ShardTask
from shared.errors import InputError
from shared.stores.open import open_store
from shared.stores.store import Store

if TYPE_CHECKING:
    from preprocess.encode import Embeddings, Event
    from preprocess.encoders import Encoders
    from preprocess.turns import Turn
    from shared.cache.rows import Place

LEAST_AT_HAND = 2
"""Shards: one that is encoded, one whose clips are being decoded."""
MOST_AT_HAND = 6
"""Of small shards, as long as the frames that are decoded ahead belong to the first of them."""
_CALLS_AT_ONCE = MOST_AT_HAND + 2
_REPORT_SECONDS = 2.0
_SWITCH_SECONDS = 0.0002
"""After which a thread lets another go on: the one that launches kernels asks for that at every launch, and would wait
5 ms each time for one that cleans captions."""
_PULSE = "pulse"
"""A thread of its own answers when the others are at work, or hang."""


class _Worker:
    """What runs in the actor. Messages come every two seconds, so that a thousand of them do not flood the driver."""

    def __init__(self) -> None:
        self._encoders: Encoders | None = None
        self._num_calls, self._count = 0, threading.Lock()

    @ray.method(concurrency_group=_PULSE)
    def place(self) -> Placed:
        """Returns where it runs."""
        return Placed(node_id=ray.get_runtime_context().get_node_id(), node=ray.util.get_node_ip_address())

    @ray.method(concurrency_group=_PULSE)
    def pulse(self) -> Pulse:
        """Returns whether it gets on; answers whatever else it is about, unless the process hangs."""
        if self._encoders is None:
            return Pulse(activity="loading", num_steps=0)
        num_steps, is_waiting = self._encoders.busy.pulse()
        if not self._num_calls:
            return Pulse(activity="idle", num_steps=num_steps)
        return Pulse(activity="waiting" if is_waiting else "encoding", num_steps=num_steps)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._count:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._count:
                self._num_calls -= 1

    def load(
        self,
        config: PreprocessConfig,
        clips_root: str,
        role: Role,
        micro_batch: MicroBatch | None,
        decode_bytes: int,
        on_gpu: bool | None,
        avoided: Collection[str],
    ) -> Loaded:
        """Loads the encoders and says what they leave in the provenance.

        Args:
            config: Resolved.
            clips_root: What the clips' sources are relative to.
            role: ``both``, ``text`` or ``vae``.
            micro_batch: Of the cache, if there is one.
            on_gpu: Whether it must encode on a GPU; None: if it finds one.
            decode_bytes: Frames decoded ahead, at most.
            avoided: Nodes that get no decoding tasks.
        """
        from preprocess.encode import ShardEncoder  # torch is loaded here, not in the driver and the decoders
        from preprocess.encoders import Encoders

        started = time.monotonic()
        sys.setswitchinterval(_SWITCH_SECONDS)
        encoders = Encoders(config, role, micro_batch, on_gpu)
        self._shards = ShardEncoder(encoders, config, clips_root)
        self._submit = Submitter(config.decoder, config.decode_timeout, on_gpu=encoders.device.type == "cuda")
        self._submit.avoid(avoided)
        self._ahead = DecodeAhead(self._submit, explainer(config.decode_timeout), decode_bytes)
        self._order = threading.Lock()
        self._encoders = encoders
        return Loaded(
            provenance=encoders.provenance(),
            seconds=time.monotonic() - started,
            device=encoders.environment()["device"],
        )

    @ray.method(concurrency_group=_PULSE)
    def avoid(self, nodes: Collection[str]) -> None:
        """Gives some nodes no more decoding tasks."""
        self._submit.avoid(nodes)

    def check_output(self, output: str, witness: str) -> None:
        """Looks whether this node sees what the driver does, and stores the embedding of the empty caption.

        Raises:
            InputError: if it does not see the file that the driver wrote into the cache.
        """
        assert self._encoders is not None
        store = open_store(output)
        if store.size(witness) is None:
            raise InputError(
                f"--output {output}: node {ray.util.get_node_ip_address()} does not see what the driver wrote "
                "there: expected a file system that every node shares, or an object store"
            )
        if self._encoders.text is not None:
            self._encoders.encode_null_caption(store)

    def embed(self, captions: Sequence[str]) -> "tuple[ShardNews, Embeddings]":
        """Returns figures and the embeddings of captions, for an actor without T5."""
        with self._at_work():
            embeddings = self._shards.embed(captions)
        return self._with_figures(ShardNews()), embeddings

    def encode(
        self, output: str, task: Task, shared: "Mapping[str, Place] | None", embeddings: "Embeddings | None"
    ) -> Iterator[ShardNews]:
        """Encodes and commits one shard, and says how it goes."""
        with self._at_work():
            yield from self._encode(open_store(output), task, shared, embeddings)

    def _encode(
        self, store: Store, task: Task, shared: "Mapping[str, Place] | None", embeddings: "Embeddings | None"
    ) -> Iterator[ShardNews]:
        turn = None
        try:
            with self._order:  # decoded in the order in which they are encoded
                turn = self._shards.turns.next()
                clips = self._ahead.open(task) if isinstance(task, ShardTask) else iter(())
            if isinstance(task, ShardTask):
                events = self._shards.encode_shard(store, task, clips, shared, embeddings=embeddings, turn=turn)
            else:
                events = self._text_events(store, task, shared, turn)
            yield from self._reports(events)
        finally:
            if turn is not None:
                turn.give_up()

    def _text_events(
        self, store: Store, task: TextTask | SharedTextTask, shared: "Mapping[str, Place] | None", turn: "Turn"
    ) -> "Iterator[Event]":
        from preprocess.encode import Begun

        yield Begun()
        if isinstance(task, TextTask):
            yield self._shards.encode_texts(store, task, shared, turn)
        else:
            yield self._shards.encode_shared_texts(store, task, turn)

    def _reports(self, events: Iterator["Event"]) -> Iterator[ShardNews]:
        """Gathers what happens to a shard: a message when it begins, one every two seconds, and one at the end."""
        from preprocess.encode import Begun

        report, reported = ShardNews(), time.monotonic()
        for event in events:
            if isinstance(event, Begun):
                yield ShardNews(has_begun=True)
            elif isinstance(event, CommittedShard):
                report.shard = event
            elif isinstance(event, Refusal):
                report.refusals.append(event)
            elif isinstance(event, Postponed):
                report.postponed.append(event)
            else:
                report.num_encoded += 1
            if time.monotonic() - reported >= _REPORT_SECONDS:
                yield self._with_figures(report)
                report, reported = ShardNews(), time.monotonic()
        yield self._with_figures(report)

    def _with_figures(self, report: ShardNews) -> ShardNews:
        assert self._encoders is not None
        report.intervals = self._encoders.busy.take()
        report.num_tokens = self._encoders.take_tokens()
        return report


Worker = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=_CALLS_AT_ONCE, concurrency_groups={_PULSE: 1})(_Worker)
