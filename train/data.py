"""From a cache to the batches of one rank.

Everything random about a sample (caption, its dropout, noise level, noise) is drawn from a generator that the seed, the
epoch and the sample's identity name. So a batch is the same whatever the rank, the worker or the history of the run.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shared.cache.dataset import Cache
from shared.cache.reader import StreamReader
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.plan import BatchPlan

LATENT, TEXT = "latent", "text.t5"

_CAPTION_MULTIPLE = 16
_SIGTERM_GRACE_SECONDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one rank trains on in one step."""

    latents: Tensor
    """(B, C, T, H, W) float32."""
    levels: Tensor
    """(B,) noise levels, int64."""
    noise: Tensor
    """(B, C, T, H, W) standard normal, float32."""
    captions: Tensor
    """(B, 1, L, D), see :func:`pad_captions`, in the codec's dtype."""
    mask: Tensor
    """(B, L) 1 at valid caption tokens."""
    drop_caption: Tensor
    """(B,) True where the null caption is trained."""

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def caption_tokens(self) -> float:
        """Mean number of valid caption tokens."""
        return float(self.mask.sum()) / len(self)

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory."""
        return Batch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})


class SampleIndex:
    """The samples of a cache, checked against its provenance; kept as columns.

    Raises:
        InputError: if the cache holds no sample, or samples that its provenance does not allow.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        for stream in (LATENT, TEXT):
            if stream not in cache.provenance:
                held = ", ".join(cache.provenance)
                raise InputError(f"{cache.root}: the cache has no stream {stream!r}, only {held}: encode it first")
        table = cache.read_index().combine_chunks()
        if not table.num_rows:
            raise InputError(f"{cache.root}: the cache holds no sample: run preprocess into it first")
        self.table = table
        latent, text = cache.provenance[LATENT], cache.provenance[TEXT]
        self.geometry = VaeGeometry(
            latent_channels=latent["latent_channels"],
            spatial_stride=latent["spatial_stride"],
            temporal_stride=latent["temporal_stride"],
        )
        self.caption_channels: int = text["text_channels"]
        self.max_tokens: int = text["max_tokens"]
        self.rows_by_bucket = _rows_by_bucket(table)
        self._check_latents()
        self._check_texts()

    def latent_size(self, bucket: Bucket) -> tuple[int, int, int]:
        """Returns the frames, rows and columns of a bucket's latents."""
        return latent_shape(bucket, self.geometry)[1:]

    def fps(self, bucket: Bucket) -> float:
        """Returns the median frame rate of a bucket's samples."""
        return float(np.median(self.table["fps"].to_numpy()[self.rows_by_bucket[bucket]]))

    def digest(self) -> str:
        """Returns a hash of the samples' identities: the plan of a run depends on them."""
        return hashlib.sha256("\n".join(self.table["sample"].to_pylist()).encode()).hexdigest()

    def _check_latents(self) -> None:
        shapes = pc.struct_field(self.table[LATENT], "shape").combine_chunks().flatten().to_numpy().reshape(-1, 4)
        for bucket, rows in self.rows_by_bucket.items():
            expected = latent_shape(bucket, self.geometry)
            wrong = rows[(shapes[rows] != expected).any(axis=1)]
            if len(wrong):
                raise InputError(
                    f"{self.cache.root}: sample {self.table['sample'][int(wrong[0])]} of bucket {bucket} has a latent "
                    f"of shape {tuple(shapes[wrong[0]].tolist())}, expected {expected}: run preprocess.verify"
                )

    def _check_texts(self) -> None:
        text = self.table[TEXT]
        channels = pc.unique(pc.struct_field(text, "channels")).to_pylist()
        if channels != [self.caption_channels]:
            raise InputError(
                f"{self.cache.root}: caption embeddings of {channels} channels, but text_channels="
                f"{self.caption_channels} in its provenance: run preprocess.verify"
            )
        lengths = pc.struct_field(text, "num_tokens").combine_chunks()
        captions, tokens = pc.list_value_length(lengths), lengths.flatten()
        if pc.min(captions).as_py() < 1 or pc.min(tokens).as_py() < 1 or pc.max(tokens).as_py() > self.max_tokens:
            raise InputError(
                f"{self.cache.root}: expected at least one caption a sample, each of 1 to {self.max_tokens} tokens: "
                "run preprocess.verify"
            )


def _rows_by_bucket(table: pa.Table) -> dict[Bucket, np.ndarray]:
    sizes = np.stack([table[name].to_numpy() for name in ("num_frames", "height", "width")], axis=1)
    buckets, inverse = np.unique(sizes, axis=0, return_inverse=True)
    return {Bucket(*map(int, size)): np.flatnonzero(inverse == i) for i, size in enumerate(buckets)}


def sample_generator(seed: int, epoch: int, sample: str) -> np.random.Generator:
    """Returns the generator of everything random about one sample in one epoch."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{sample}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def pad_captions(captions: list[Tensor], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Returns captions (B, L, D) padded with zeros, and their mask (B, L).

    L is the longest of them, rounded up to a multiple of 16 (but at most ``max_tokens``): GPU kernels are planned anew
    for each L that they meet, which costs more than the padding.
    """
    longest = max(len(caption) for caption in captions)
    length = min(max_tokens, -(-longest // _CAPTION_MULTIPLE) * _CAPTION_MULTIPLE)
    padded = captions[0].new_zeros(len(captions), length, captions[0].shape[1])
    mask = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        padded[row, : len(caption)] = caption
        mask[row, : len(caption)] = 1
    return padded, mask


class RankBatches(Dataset[Batch | InputError]):
    """One rank's part of every step's batch; a step is the index.

    An :class:`InputError` is returned, not raised: a worker process would wrap its one line into a traceback.

    Args:
        index: The cache's samples.
        plan: Which of them each step takes.
        part: This rank's slice of the global batch.
        seed: Not negative.
        num_levels: Noise levels to draw from.
        caption_dropout: How often the null caption is trained.
    """

    def __init__(
        self, index: SampleIndex, plan: BatchPlan, *, part: slice, seed: int, num_levels: int, caption_dropout: float
    ) -> None:
        self._table = index.table.select(["sample", LATENT, TEXT])
        self._reader = StreamReader(Path(index.cache.root))
        self._plan, self._part, self._seed, self._max_tokens = plan, part, seed, index.max_tokens
        self._num_levels, self._caption_dropout = num_levels, caption_dropout

    def __getitem__(self, step: int) -> Batch | InputError:
        planned = self._plan.batch(step)
        rows, epochs = planned.rows[self._part], planned.epochs[self._part]
        try:
            drawn = [self._draw(int(row), int(epoch)) for row, epoch in zip(rows, epochs, strict=True)]
        except InputError as error:
            return error
        captions, mask = pad_captions([sample["caption"] for sample in drawn], self._max_tokens)
        return Batch(
            latents=torch.stack([sample["latent"] for sample in drawn]),
            levels=torch.tensor([sample["level"] for sample in drawn]),
            noise=torch.stack([sample["noise"] for sample in drawn]),
            captions=captions[:, None],
            mask=mask,
            drop_caption=torch.tensor([sample["drop"] for sample in drawn]),
        )

    def _draw(self, row: int, epoch: int) -> dict[str, Any]:
        entry = self._table.slice(row, 1).to_pylist()[0]
        latent = self._reader.latent(entry[LATENT]).float()
        captions = self._reader.text(entry[TEXT])
        generator = sample_generator(self._seed, epoch, entry["sample"])
        level = int(generator.integers(self._num_levels))
        caption = captions[int(generator.integers(len(captions)))]
        drop = bool(generator.random() < self._caption_dropout)
        noise = torch.from_numpy(generator.standard_normal(tuple(latent.shape), dtype=np.float32))
        return {"latent": latent, "level": level, "caption": caption, "drop": drop, "noise": noise}


def load_batches(batches: RankBatches, steps: range, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yields one rank's batches of ``steps``, in order, read ahead by worker processes.

    Raises:
        InputError: if a payload is missing or damaged.
    """
    loader = DataLoader(
        batches,
        sampler=steps,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_sigterm if num_workers else None,
        prefetch_factor=2 if num_workers else None,
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


def _outlive_sigterm(_worker: int) -> None:
    """Lets a worker process survive a SIGTERM for long enough that the trainer gets the batch that it waits for.

    A scheduler sends the signal to every process of a job. The trainer then asks for no further batch. A worker must
    end all the same, as an interpreter that exits waits for it; and with code 0, or PyTorch raises in the trainer.
    """
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SIGTERM_GRACE_SECONDS))
