"""Batches of clips that are decoded and encoded while the model trains: those of a cache of the same manifest.

What a step takes and what is drawn for it follows from the index, as with a cache. Clips of the steps to come are
decoded by processes; T5 and the autoencoder run on the training's own stream when a batch is asked for, so that they
take their share of the device between two steps, and nothing waits for them but what needs them.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.cache.ledger import Refusal
from shared.errors import InputError
from shared.spec import Bucket
from train.config.online import OnlineWindows
from train.data import Batch
from train.draws import draw_captions, sample_keys
from train.online.decoding import ClipDecoder, Decoding
from train.online.index import OnlineIndex
from train.online.ledger import OnlineLedger
from train.online.pool import ProcessPool
from train.permutation import hash_words, uniform
from train.plan import BatchPlan, rank_slots
from train.rank_batches import OnCorrupt
from train.step_samples import StepSamples, draw_step, padded_length

_WINDOW = 0x57494E44
_LEAST_STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineJob:
    """All that decides one rank's batches, and how they are made."""

    index: OnlineIndex
    plan: BatchPlan
    rank: int
    world_size: int
    seed: int
    caption_dropout: float
    """How often the null caption is trained."""
    windows: OnlineWindows = "planned"
    on_corrupt: OnCorrupt = "stop"
    """At a clip that cannot be decoded."""
    num_workers: int = 2
    """Processes that decode."""
    timeout_seconds: float = 300.0
    """Of decoding a clip."""
    ahead_bytes: int = 2 << 30
    """Of decoded frames that wait, at most, beyond those of the next batch."""
    ledger: Path
    """The file that tells of clips that cannot be decoded; no other process writes it."""


def online_batches(job: OnlineJob, steps: range) -> Iterator[Batch]:
    """Yields one rank's batches of ``steps``, in order, on the device of the encoders, but for the masks.

    Raises:
        InputError: if a clip cannot be decoded, unless such clips are skipped; if none of a bucket can.
    """
    assert steps.step == 1
    with ProcessPool(num_workers=job.num_workers, timeout_seconds=job.timeout_seconds) as pool:
        decoder = ClipDecoder(pool, timeout_seconds=job.timeout_seconds)
        source = _Source(job, decoder)
        begun: deque[_Begun] = deque()
        upcoming = iter(steps)
        while True:
            while source.has_room(begun) and (step := next(upcoming, None)) is not None:
                begun.append(source.begin(step))
            if not begun:
                return
            yield source.finish(begun.popleft())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """A step whose clips are being decoded."""

    samples: StepSamples
    clips: tuple[Decoding | None, ...]
    """By the rank's slots; None for clips that are in the ledger."""


class _Source:
    """Makes the batches.

    Args:
        job: The rank's.
        decoder: Of clips.
    """

    def __init__(self, job: OnlineJob, decoder: ClipDecoder) -> None:
        self._job, self._decoder = job, decoder
        self._columns, self._encoders = job.index.columns, job.index.encoders
        self._ledger = OnlineLedger(job.ledger)

    def has_room(self, begun: Sequence[_Begun]) -> bool:
        """Returns whether the clips of one more step may be decoded."""
        waiting = sum(len(step.clips) * _frame_bytes(step.samples.bucket) for step in begun)
        return len(begun) < _LEAST_STEPS_AHEAD or waiting < self._job.ahead_bytes

    def begin(self, step: int) -> _Begun:
        """Has the clips of a step decoded."""
        job = self._job
        samples = draw_step(
            job.plan,
            self._columns,
            step,
            seed=job.seed,
            caption_dropout=job.caption_dropout,
            max_tokens=job.index.max_tokens,
        )
        bucket, mine = samples.bucket, self._slots(samples.bucket)
        clips = [
            self._start(bucket, row, epoch)
            for row, epoch in zip(samples.rows[mine].tolist(), samples.epochs[mine].tolist(), strict=True)
        ]
        return _Begun(samples=samples, clips=tuple(clips))

    def finish(self, begun: _Begun) -> Batch:
        """Returns the batch of a step."""
        samples, bucket = begun.samples, begun.samples.bucket
        mine = self._slots(bucket)
        rows, captions = samples.rows[mine].copy(), samples.captions[mine].copy()
        epochs = samples.epochs[mine].tolist()
        frames: list[tuple[str, np.ndarray]] = []
        num_skipped = 0
        for place, decoding in enumerate(begun.clips):
            found = self._decoded(decoding)
            if found is None:
                num_skipped += 1
                rows[place], captions[place], found = self._replacing(bucket, int(rows[place]), epochs[place])
            frames.append(found)
        started = time.perf_counter()
        latents = self._encoders.encode_clips(frames)
        texts = self._encoders.encode_captions([self._columns.tokens(number) for number in captions.tolist()])
        padded, mask = _padded(texts, max(samples.caption_length, self._padded_length(captions)))
        device, draws, columns = self._encoders.device, samples.draws, self._columns

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, non_blocking=True)

        ones = torch.ones(len(rows), device=device)
        return Batch(
            latents=latents,
            u=on_device(draws.u[mine]),
            noise_keys=torch.from_numpy(draws.noise_key[mine]),
            captions=padded[:, None],
            mask=mask,
            drop_caption=on_device(draws.drop[mine]),
            fps=on_device(columns.fps[rows]),
            height=ones * bucket.height,
            width=ones * bucket.width,
            identity=torch.from_numpy(columns.identity[rows].view(np.int64)),
            moments=self._job.index.moments,
            num_skipped=num_skipped,
            encode_seconds=time.perf_counter() - started,
        )

    def _slots(self, bucket: Bucket) -> slice:
        return rank_slots(self._job.plan.batch_size(bucket), self._job.rank, self._job.world_size)

    def _padded_length(self, captions: np.ndarray) -> int:
        return padded_length(int(self._columns.num_tokens[captions].max()), self._job.index.max_tokens)

    def _start(self, bucket: Bucket, row: int, epoch: int) -> Decoding | None:
        task = self._job.index.task(bucket, row, self._window(bucket, row, epoch))
        return None if task.sample in self._ledger else self._decoder.start(task, bucket)

    def _window(self, bucket: Bucket, row: int, epoch: int) -> int | None:
        """Returns where a sample's window starts in an epoch; None: where it was planned."""
        if self._job.windows == "planned":
            return None
        key = sample_keys(self._job.seed, np.array([epoch]), self._columns.identity[[row]])
        span = self._job.index.encoding.sampling.span(bucket.num_frames)
        free = int(self._columns.num_places[row]) - span + 1
        return int(uniform(hash_words(key, _WINDOW))[0] * free)

    def _decoded(self, decoding: Decoding | None) -> tuple[str, np.ndarray] | None:
        """Returns a sample's identity and frames; None if it has none and such samples are skipped."""
        if decoding is None:
            return None
        found = self._decoder.finish(decoding)
        if not isinstance(found, Refusal):
            return decoding.task.sample, found
        if self._job.on_corrupt == "stop":
            raise InputError(
                f"{found.source}: {found.reason}: {found.detail}: mend it, take it out of the manifest, or use "
                "--on-corrupt skip"
            )
        self._ledger.add(found)
        return None

    def _replacing(self, bucket: Bucket, lost: int, epoch: int) -> tuple[int, int, tuple[str, np.ndarray]]:
        """Returns the bucket's next good sample of the index, as where a cache is damaged: row, caption, frames."""
        columns, rows = self._columns, self._job.plan.walk(bucket).rows
        ring = np.roll(np.arange(rows.first_row, rows.first_row + rows.num_rows), rows.first_row - lost)[1:]
        for row in ring.tolist():
            found = self._decoded(self._start(bucket, row, epoch))
            if found is not None:
                key = sample_keys(self._job.seed, np.array([epoch]), columns.identity[[row]])
                first, end = int(columns.caption_start[row]), int(columns.caption_start[row + 1])
                return row, first + int(draw_captions(key, np.array([end - first]))[0]), found
        raise InputError(f"bucket {bucket}: none of its clips can be decoded: see {self._ledger.path}")


def _padded(texts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Returns embeddings (B, L, D), padded with zeros, and their mask (B, L), on the CPU."""
    first = texts[0]
    padded = torch.zeros(len(texts), length, first.shape[1], dtype=first.dtype, device=first.device)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    lengths = torch.tensor([len(text) for text in texts])
    return padded, (torch.arange(length) < lengths[:, None]).long()


def _frame_bytes(bucket: Bucket) -> int:
    return bucket.num_frames * bucket.height * bucket.width * 3
