"""Encoding one shard: decoded clips through T5 and the VAE into the cache. No Ray here.

Every latent depends on its own clip only, and every embedding on the captions of its own shard only; batches never
reach over a shard. So a shard's bytes are the same on any number of workers.

Several shards may be under way in threads: they launch their kernels one after another (:class:`Turns`), while the
payloads of the shard before are being compressed and committed. So the GPU does not wait between shards.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from preprocess.config import PreprocessConfig
from preprocess.encoders import Encoders
from preprocess.text_plan import SharedTextTask, TextTask
from preprocess.turns import Turn, Turns
from shared.cache.commit import ShardWriter, commit_rows
from shared.cache.dataset import CommittedShard
from shared.cache.fragments import SHARED_KIND
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.rows import Place, Row, Sample, Text, sample_row, shared_text_row, text_row
from shared.cache.schema import rows_table
from shared.cache.shard_file import StoredArray
from shared.clips.decode import Frames, Postponed, refuse
from shared.clips.plan import SampleTask, ShardTask
from shared.clips.texts import Caption, identify
from shared.encoders.captions import clean_caption
from shared.encoders.t5 import Prepared
from shared.errors import InputError
from shared.stores.store import Store

_NOTHING_LEFT = "cleaning leaves nothing of {!r}: mend the caption or use --cleaning none in another cache"
_FINISHERS = 4
"""Threads a GPU that compress payloads."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A shard has its turn: from now on it may be what a worker dies of."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample is encoded."""


Event = Begun | Encoded | Refusal | Postponed | CommittedShard
"""Of a shard: that it has begun; of each sample: that it is encoded, or why not; at the end: what was committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embeddings:
    """Embeddings of captions that another worker made, on the CPU."""

    captions: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each."""
    together: torch.Tensor  # (sum of lengths, D): one array, since a view would be sent with all that it is a view of


class ShardEncoder:
    """Encodes shards with the encoders of one worker, and commits them.

    Args:
        encoders: Of this worker.
        config: The job's options, resolved.
        clips_root: Where sources are relative to; recorded with each shard.
    """

    def __init__(self, encoders: Encoders, config: PreprocessConfig, clips_root: str) -> None:
        self._encoders, self._config, self._clips_root = encoders, config, clips_root
        self.turns = Turns()
        on_gpu = encoders.device.type == "cuda"
        self._finishers = ThreadPoolExecutor(_FINISHERS if on_gpu else 1, thread_name_prefix="finish")

    def embed(self, captions: Sequence[str], turn: Turn | None = None) -> Embeddings:
        """Returns the embeddings of captions, for a worker that has no T5."""
        assert self._encoders.text is not None
        wanted = [caption for caption in captions if clean_caption(caption, self._config.cleaning)]
        prepared = self._encoders.text.prepare(wanted)
        with turn or self.turns.next():
            tensors = _to_host(self._encoders.text.encode_prepared(prepared)).tensors()
        lengths = tuple(len(tensor) for tensor in tensors)
        together = torch.cat(list(tensors)) if tensors else torch.empty(0, self._encoders.text.channels)
        return Embeddings(captions=tuple(wanted), lengths=lengths, together=together)

    def encode_shard(
        self,
        store: Store,
        task: ShardTask,
        clips: Iterable[Frames],
        shared: Mapping[str, Place] | None = None,
        *,
        embeddings: Embeddings | None = None,
        turn: Turn | None = None,
    ) -> Iterator[Event]:
        """Encodes and commits one shard.

        Args:
            store: The cache's.
            task: What the shard holds.
            clips: For each sample of the task, in its order: its frames, or why there are none.
            shared: Where the texts lie that samples share, by identity, if they are stored apart.
            embeddings: Of the shard's captions, if another worker made them.
            turn: When this shard's kernels may be launched; without it, after those of calls before.

        Yields:
            That it has begun; after each sample that it is encoded, or why not; at the end the committed shard.
        """
        assert self._encoders.vae is not None
        captions = {
            sample.sample: identify(sample.captions, lambda text: clean_caption(text, self._config.cleaning))
            for sample in task.samples
        }
        wanted = self._wanted(captions, shared, embeddings)
        usable = _Usable(task, clips, captions, self._encoders)
        finished: deque[tuple[SampleTask, Future[tuple[Row, dict[str, list[StoredArray]]]]]] = deque()
        refusals: list[Refusal] = []
        rows: list[tuple[Row, dict[str, list[StoredArray]]]] = []

        def outcomes(*, wait: bool) -> Iterator[Event]:
            for outcome in usable.take_lost():
                if isinstance(outcome, Refusal):
                    refusals.append(outcome)
                yield outcome
            while finished and (wait or finished[0][1].done()):
                sample, future = finished.popleft()
                try:
                    rows.append(future.result())
                except InputError as error:
                    refusals.append(refuse(sample, task.bucket, "not_storable", str(error)))
                    yield refusals[-1]
                else:
                    yield Encoded()

        with turn or self.turns.next():
            yield Begun()
            texts = self._texts(captions, wanted, shared, embeddings)
            for _, latent in self._encoders.vae.encode_each(usable.frames()):
                sample = usable.pop()
                host = _to_host([latent])
                finished.append((sample, self._finishers.submit(self._row, sample, task, host, texts)))
                yield from outcomes(wait=False)
            was_halved = self._encoders.has_halved()
        with self._encoders.busy.measure("commit"):
            yield from outcomes(wait=True)
            with self._writer(store, task.shard_id, str(task.bucket)) as writer:
                for row, arrays in rows:
                    writer.add(row, arrays)
                if was_halved:
                    writer.record("out_of_memory", True)
                write_ledger(store, refusals)
                shard = writer.commit()
        yield shard

    def _row(
        self, sample: SampleTask, task: ShardTask, latent: "_OnHost", texts: "_Texts"
    ) -> tuple[Row, dict[str, list[StoredArray]]]:
        encoded = Sample(
            sample=sample.sample,
            source=sample.source,
            source_version=sample.source_version,
            bucket=task.bucket,
            frame_interval=sample.window.interval,
            fps=sample.fps,
            latent=latent.tensors()[0],
            texts={self._config.text_stream: texts.of(sample.sample)},
            manifest=sample.columns,
            time_range=sample.time_range,
            sampling_fps=sample.window.fps,
            window=sample.stored_window,
            flip=sample.window.flip,
        )
        return sample_row(encoded, self._encoders.codecs, task.generation)

    def encode_texts(
        self, store: Store, task: TextTask, shared: Mapping[str, Place] | None = None, turn: Turn | None = None
    ) -> CommittedShard:
        """Encodes and commits new texts of committed samples; those that lie somewhere already are named only."""
        stream = self._config.text_stream
        captions = {sample.sample: sample.captions for sample in task.samples}
        wanted = self._wanted(captions, shared)
        with turn or self.turns.next():
            texts = self._texts(captions, wanted, shared)
        codec = self._encoders.codecs[stream]
        rows = [
            text_row(sample.sample, stream, texts.of(sample.sample), codec, sample.generation)
            for sample in task.samples
        ]
        if shared is not None:
            table = rows_table([row for row, _ in rows])
            created = commit_rows(store, task.shard_id, table, self._record())
            return CommittedShard(shard="", num_samples=len(rows), num_bytes=0, created=created)
        with self._writer(store, task.shard_id, stream) as writer:
            for row, arrays in rows:
                writer.add(row, arrays)
            return writer.commit()

    def encode_shared_texts(self, store: Store, task: SharedTextTask, turn: Turn | None = None) -> CommittedShard:
        """Encodes and commits texts that samples share."""
        stream = self._config.text_stream
        captions = {caption.id: (caption,) for caption in task.captions}
        wanted = self._wanted(captions)
        with turn or self.turns.next():
            texts = self._texts(captions, wanted)
        with self._writer(store, task.shard_id, stream, kind=SHARED_KIND) as writer:
            for caption in task.captions:
                writer.add(*shared_text_row(stream, texts.of(caption.id)[0], self._encoders.codecs[stream]))
            return writer.commit()

    def _wanted(
        self,
        captions: Mapping[str, tuple[Caption, ...]],
        shared: Mapping[str, Place] | None = None,
        embeddings: Embeddings | None = None,
    ) -> Prepared | None:
        """Returns what T5 is to embed here, if anything; before the turn, while the GPU is at work on other shards."""
        if shared is not None or embeddings is not None:
            return None
        assert self._encoders.text is not None
        return self._encoders.text.prepare(_names(captions))

    def _texts(
        self,
        captions: Mapping[str, tuple[Caption, ...]],
        wanted: Prepared | None,
        shared: Mapping[str, Place] | None = None,
        embeddings: Embeddings | None = None,
    ) -> "_Texts":
        """Returns the texts of each key, embedded here or elsewhere, or, if they are shared, where they lie."""
        if shared is not None:
            return _Texts(captions, shared=shared)
        names = _names(captions)
        if embeddings is None:
            assert self._encoders.text is not None
            assert wanted is not None
            return _Texts(captions, names=names, host=_to_host(self._encoders.text.encode_prepared(wanted)))
        by_caption = dict(zip(embeddings.captions, embeddings.together.split(embeddings.lengths), strict=True))
        return _Texts(captions, names=names, host=_to_host([by_caption[caption] for caption in names]))

    def _record(self) -> dict[str, Any]:
        return {"clips_root": self._clips_root, "environment": self._encoders.environment()}

    def _writer(self, store: Store, shard_id: str, folder: str, kind: str = "samples") -> ShardWriter:
        return ShardWriter(
            store,
            shard_id=shard_id,
            folder=folder,
            container=self._config.container,
            record={**self._record(), "kind": kind},
        )


def _names(captions: Mapping[str, tuple[Caption, ...]]) -> list[str]:
    return [text.caption for texts in captions.values() for text in texts]


class _Usable:
    """The samples of a shard whose frames are there, one after another, and what became of the others."""

    def __init__(
        self,
        task: ShardTask,
        clips: Iterable[Frames],
        captions: Mapping[str, tuple[Caption, ...]],
        encoders: Encoders,
    ) -> None:
        self._task, self._clips, self._captions, self._busy = task, clips, captions, encoders.busy
        self._taken: deque[SampleTask] = deque()
        self._lost: list[Refusal | Postponed] = []

    def frames(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields identity and frames of each usable sample."""
        clips = _one_ahead(iter(self._clips))
        for sample in self._task.samples:
            with self._busy.measure("wait"):
                frames = next(clips)
            if not self._captions[sample.sample] and isinstance(frames, np.ndarray):
                detail = _NOTHING_LEFT.format(sample.captions[0])
                frames = refuse(sample, self._task.bucket, "no_caption_left", detail)
            if not isinstance(frames, np.ndarray):
                self._lost.append(frames)
                continue
            self._taken.append(sample)
            yield sample.sample, frames
            del frames

    def pop(self) -> SampleTask:
        """Returns the first of the usable samples that :meth:`frames` gave and nobody popped."""
        return self._taken.popleft()

    def take_lost(self) -> list[Refusal | Postponed]:
        """Returns the samples that are not usable, since the last call."""
        lost, self._lost = self._lost, []
        return lost


def _one_ahead(clips: Iterator[Frames]) -> Iterator[Frames]:
    """Yields clips, while a thread fetches the next one: half a millisecond each, in which kernels can be launched."""
    asked: SimpleQueue[bool] = SimpleQueue()
    ready: SimpleQueue[Frames | BaseException | None] = SimpleQueue()

    def fetch() -> None:
        while asked.get():
            try:
                ready.put(next(clips, None))
            except BaseException as error:  # whoever waits gets it
                ready.put(error)

    threading.Thread(target=fetch, name="fetch", daemon=True).start()
    asked.put(True)
    try:
        while (frames := ready.get()) is not None:
            if isinstance(frames, BaseException):
                raise frames
            asked.put(True)
            yield frames
            del frames
    finally:
        asked.put(False)


class _OnHost:
    """Tensors on their way to the CPU."""

    def __init__(self, tensors: Sequence[torch.Tensor], event: "torch.cuda.Event | None") -> None:
        self._tensors, self._event = tensors, event

    def tensors(self) -> Sequence[torch.Tensor]:
        """Returns them, on the CPU, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _to_host(tensors: Sequence[torch.Tensor]) -> _OnHost:
    """Starts copying tensors of one width to the CPU, without waiting for the kernels that compute them."""
    if not tensors or tensors[0].device.type == "cpu":
        return _OnHost(tensors, None)
    lengths = [len(tensor) for tensor in tensors]
    together = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
    host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    host.copy_(together, non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record()
    return _OnHost(host.split(lengths), event)


class _Texts:
    """The texts of the samples of a shard."""

    def __init__(
        self,
        captions: Mapping[str, tuple[Caption, ...]],
        *,
        shared: Mapping[str, Place] | None = None,
        names: Sequence[str] = (),
        host: _OnHost | None = None,
    ) -> None:
        self._captions, self._shared, self._host = captions, shared, host
        self._places = {caption: place for place, caption in enumerate(names)}

    def of(self, key: str) -> tuple[Text, ...]:
        """Returns the texts of one sample."""
        return tuple(
            Text(id=text.id, caption=text.caption, embedding=self._embedding(text)) for text in self._captions[key]
        )

    def _embedding(self, text: Caption) -> torch.Tensor | Place:
        if self._shared is not None:
            return self._shared[text.id]
        assert self._host is not None
        return self._host.tensors()[self._places[text.caption]]
