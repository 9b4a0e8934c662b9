"""One worker's share of one rank's batches: some slots, walked run by run.

A worker owns slots for good, so it fetches each of their runs once. Threads fetch the runs of the steps to come while
payloads are checked and decoded into the batch.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shared.cache.payload import decode, decode_into, decoded_dtype
from shared.codec import Codec
from shared.errors import InputError
from shared.spec import Bucket
from shared.stores.store import Store
from train.batch_memory import BatchShape, BatchTensors
from train.bucket_walk import Visit
from train.draws import draw_captions, sample_keys
from train.index_columns import Array, IndexColumns, IndexFolder, Payloads
from train.local_copies import LocalCopies
from train.plan import BatchPlan, rank_slots
from train.run_reader import DamagedError, Run, open_reader, run_payloads
from train.sample_index import SampleIndex
from train.step_samples import draw_step

OnCorrupt = Literal["stop", "skip"]

_STEPS_AHEAD = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderJob:
    """All that decides one rank's batches. Cheap to pickle."""

    store: Store
    index: IndexFolder
    plan: BatchPlan
    latent_shapes: dict[Bucket, tuple[int, int, int, int]]
    """As stored, by bucket: (C, T, H, W), or (2C, T, H, W) of moments."""
    moments: bool
    """Whether latents are means and logarithms of variances."""
    shards: list[str]
    """Names, by number in the index."""
    codecs: list[str]
    """Likewise."""
    caption_channels: int
    max_tokens: int
    rank: int
    world_size: int
    seed: int
    caption_dropout: float
    """How often the null caption is trained."""
    on_corrupt: OnCorrupt = "stop"
    copies: LocalCopies | None = None

    @classmethod
    def of_index(cls, index: SampleIndex, plan: BatchPlan, **settings: Any) -> "LoaderJob":
        """Returns the job of a plan over an index; ``settings`` are the fields that those do not decide."""
        return cls(
            store=index.cache.store,
            index=index.folder,
            plan=plan,
            latent_shapes={bucket: index.stored_shape(bucket) for bucket in plan.buckets},
            moments=index.moments,
            shards=index.shards,
            codecs=index.codecs,
            caption_channels=index.caption_channels,
            max_tokens=index.max_tokens,
            **settings,
        )

    def slots(self, bucket: Bucket) -> slice:
        """Returns the rank's slots of a bucket's global batches."""
        return rank_slots(self.plan.batch_size(bucket), self.rank, self.world_size)

    def batch_size(self, bucket: Bucket) -> int:
        """Returns the rank's part of a bucket's global batches."""
        return self.plan.batch_size(bucket) // self.world_size

    def shape(self, bucket: Bucket, caption_length: int, dtypes: tuple[torch.dtype, torch.dtype]) -> BatchShape:
        """Returns how the rank's part of a batch lies in memory."""
        return BatchShape(
            batch_size=self.batch_size(bucket),
            latent_shape=self.latent_shapes[bucket],
            caption_length=caption_length,
            caption_channels=self.caption_channels,
            latent_dtype=dtypes[0],
            caption_dtype=dtypes[1],
        )


@dataclass(kw_only=True, slots=True)
class Report:
    """What a worker did of a step."""

    bucket: Bucket
    caption_length: int
    """To which captions are padded: the same on all ranks."""
    skipped: int = 0
    """Samples that others took the place of."""
    too_long: dict[int, Array] = field(default_factory=dict)
    """By place in the rank's batch: captions of those that exceed ``caption_length``, (L, bytes of D values)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fetched:
    """A fetched run and the numbers of its payloads."""

    run: Run
    latents: dict[int, int]
    """By row."""
    captions: dict[int, int]
    """By the caption's number in the index."""


def batch_dtypes(columns: IndexColumns, codecs: list[str]) -> tuple[torch.dtype, torch.dtype]:
    """Returns the types in which latents and captions are delivered: bfloat16, or float32 where that is stored."""

    def delivered(payloads: Payloads) -> torch.dtype:
        stored = {decoded_dtype(Codec.parse(codecs[number])) for number in np.unique(payloads.codec)}
        return torch.float32 if torch.float32 in stored else torch.bfloat16

    return delivered(columns.latent), delivered(columns.caption)


class SlotFiller:
    """Fills some slots' places in one rank's batches, for consecutive steps.

    Args:
        job: The rank's.
        steps: Which will be asked for, in order.
        part: This worker's number.
        num_parts: Workers of the rank.
    """

    def __init__(self, job: LoaderJob, steps: range, *, part: int = 0, num_parts: int = 1) -> None:
        self._job, self._steps = job, steps
        self._columns = job.index.columns()
        self._plan, self._ahead = copy.deepcopy(job.plan), copy.deepcopy(job.plan)
        self._reader = open_reader(job.store, job.shards, job.copies)
        self._codecs = [Codec.parse(codec) for codec in job.codecs]
        self._dtypes = batch_dtypes(self._columns, job.codecs)
        self._places = {bucket: _share(job.batch_size(bucket), part, num_parts) for bucket in job.plan.buckets}
        self._threads = ThreadPoolExecutor(self._reader.num_threads)
        self._planned = steps.start
        self._asked: dict[tuple[Bucket, int], tuple[int, int]] = {}
        self._fetching: dict[tuple[Bucket, int, int, int], Future[_Fetched]] = {}
        self._current: dict[tuple[Bucket, int], tuple[tuple[int, int], _Fetched]] = {}

    def fill(self, step: int, buffer: Array) -> Report:
        """Fills this worker's places of a step's batch and returns what there is to say about it.

        Raises:
            InputError: if a payload is missing or damaged, unless such samples are skipped.
        """
        self._ask_ahead(step)
        job, columns = self._job, self._columns
        taken = draw_step(
            self._plan,
            columns,
            step,
            seed=job.seed,
            caption_dropout=job.caption_dropout,
            max_tokens=job.max_tokens,
        )
        bucket, length, draws = taken.bucket, taken.caption_length, taken.draws
        rows, epochs, captions = taken.rows, taken.epochs, taken.captions
        report = Report(bucket=bucket, caption_length=length)
        tensors = job.shape(bucket, length, self._dtypes).tensors(buffer)
        first = job.slots(bucket).start
        places = self._places[bucket]
        mine = slice(first + places.start, first + places.stop)
        runs, _ = self._plan.walk(bucket).runs(taken.number, mine)
        tensors.u[places.start : places.stop] = torch.from_numpy(draws.u[mine])
        tensors.noise_keys[places.start : places.stop] = torch.from_numpy(draws.noise_key[mine])
        tensors.drop_caption[places.start : places.stop] = torch.from_numpy(draws.drop[mine])
        for place, run in zip(places, runs.tolist(), strict=True):
            slot = first + place
            row, caption, epoch = int(rows[slot]), int(captions[slot]), int(epochs[slot])
            fetched = self._fetched(bucket, slot, epoch, run)
            try:
                self._load(fetched, row, caption, tensors, place, report)
            except DamagedError as error:
                if job.on_corrupt == "stop":
                    raise
                self._replace(bucket, row, epoch, error, tensors, place, report)
        return report

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask_ahead(self, step: int) -> None:
        """Has the runs fetched that the next steps enter."""
        while self._planned < min(step + _STEPS_AHEAD, self._steps.stop):
            bucket, number = self._ahead.locate(self._planned)
            walk, places = self._ahead.walk(bucket), self._places[bucket]
            first = self._job.slots(bucket).start
            runs, epochs = walk.runs(number, slice(first + places.start, first + places.stop))
            for place, run, epoch in zip(places, runs.tolist(), epochs.tolist(), strict=True):
                slot = first + place
                if self._asked.get((bucket, slot)) != (epoch, run):
                    self._asked[bucket, slot] = (epoch, run)
                    visit = walk.visit(number, slot)
                    self._fetching[bucket, slot, epoch, run] = self._threads.submit(self._fetch, bucket, visit)
            self._planned += 1

    def _fetch(self, bucket: Bucket, visit: Visit) -> _Fetched:
        columns = self._columns
        if self._reader.reads_whole_runs:  # what is kept must not depend on what is chosen in this epoch
            rows = self._job.plan.walk(bucket).run_rows(visit.run, visit.epoch)
            starts = columns.caption_start[rows]
            counts = columns.caption_start[rows + 1] - starts
            captions = np.arange(counts.sum()) + np.repeat(starts - (counts.cumsum() - counts), counts)
        else:
            rows = np.array(visit.rows)
            keys = sample_keys(self._job.seed, np.full(len(rows), visit.epoch), columns.identity[rows])
            starts = columns.caption_start[rows]
            captions = starts + draw_captions(keys, columns.caption_start[rows + 1] - starts)
        run = self._reader.fetch(run_payloads(columns, rows, captions))
        return _Fetched(
            run=run,
            latents={row: number for number, row in enumerate(rows.tolist())},
            captions={caption: len(rows) + number for number, caption in enumerate(captions.tolist())},
        )

    def _fetched(self, bucket: Bucket, slot: int, epoch: int, run: int) -> _Fetched:
        """Returns the run at which a slot is; the one before it is let go."""
        current = self._current.get((bucket, slot))
        if current is not None and current[0] == (epoch, run):
            return current[1]
        fetched = self._fetching.pop((bucket, slot, epoch, run)).result()
        self._current[bucket, slot] = ((epoch, run), fetched)
        return fetched

    def _load(
        self, fetched: _Fetched, row: int, caption: int, tensors: BatchTensors, place: int, report: Report
    ) -> None:
        columns = self._columns
        self._read(fetched.run, fetched.latents[row], columns.latent, row, tensors.latents[place])
        tensors.fps[place] = float(columns.fps[row])
        tensors.identity[place] = torch.tensor(columns.identity[row].view(np.int64))
        length = int(columns.num_tokens[caption])
        number = fetched.captions[caption]
        if length > report.caption_length:
            whole = torch.empty(length, tensors.captions.shape[2], dtype=tensors.captions.dtype)
            self._read(fetched.run, number, columns.caption, caption, whole)
            report.too_long[place] = whole.view(torch.uint8).numpy()
            return
        self._read(fetched.run, number, columns.caption, caption, tensors.captions[place, :length])
        tensors.captions[place, length:] = 0
        tensors.mask[place, :length] = 1
        tensors.mask[place, length:] = 0

    def _read(self, run: Run, number: int, payloads: Payloads, row: int, out: Tensor) -> None:
        """Reads, checks and decodes one payload into ``out``."""
        codec = self._codecs[payloads.codec[row]]
        same_type = decoded_dtype(codec) == out.dtype
        if same_type and not codec.zstd and codec.values != "int8" and payloads.num_bytes[row] == out.nbytes:
            self._reader.checked(run, number, payloads, row, out.view(torch.uint8).numpy().reshape(-1))
            return
        data = self._reader.checked(run, number, payloads, row)
        try:
            if same_type:
                decode_into(data.data, codec, out)
            else:
                out.copy_(decode(data.data, codec, tuple(out.shape)))
        except InputError as error:
            where = f"{self._job.shards[payloads.shard[row]]}, offset {payloads.offset[row]}"
            raise DamagedError(f"{where}: {error}: run preprocess.verify") from None

    def _replace(
        self,
        bucket: Bucket,
        damaged: int,
        epoch: int,
        error: DamagedError,
        tensors: BatchTensors,
        place: int,
        report: Report,
    ) -> None:
        """Puts the bucket's next good sample of the index into a damaged one's place; its noise stays.

        Raises:
            InputError: if there is none.
        """
        columns = self._columns
        report.skipped += 1
        for row in self._rows_after(bucket, damaged, error):
            rows = np.array([row])
            key = sample_keys(self._job.seed, np.array([epoch]), columns.identity[rows])
            start, end = int(columns.caption_start[row]), int(columns.caption_start[row + 1])
            caption = start + int(draw_captions(key, np.array([end - start]))[0])
            run = self._reader.fetch(run_payloads(columns, rows, np.array([caption])))
            try:
                fetched = _Fetched(run=run, latents={row: 0}, captions={caption: 1})
                self._load(fetched, row, caption, tensors, place, report)
            except DamagedError:
                continue
            else:
                return
        raise InputError(f"bucket {bucket}: none of its samples can be read: {error}")

    def _rows_after(self, bucket: Bucket, damaged: int, error: DamagedError) -> Iterator[int]:
        """Yields the other rows of a bucket in the index's order from ``damaged`` on, then from the first; of a shard
        that is missing none."""
        rows = self._job.plan.walk(bucket).rows
        ring = np.roll(np.arange(rows.first_row, rows.first_row + rows.num_rows), rows.first_row - damaged)[1:]
        if error.missing_shard is not None:
            ring = ring[self._columns.latent.shard[ring] != error.missing_shard]
        yield from ring.tolist()


def _share(batch_size: int, part: int, num_parts: int) -> range:
    return range(batch_size * part // num_parts, batch_size * (part + 1) // num_parts)
