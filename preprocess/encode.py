"""Encoding one shard: decoded clips through T5 and the VAE into the cache. No Ray here.

Every latent depends on its own clip only, and every embedding on its own caption; batches never reach over a shard. So
a shard's bytes are the same on any number of workers.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import av
import numpy as np
import PIL
import torch
import zstandard

from preprocess.config import PreprocessConfig
from preprocess.decode import refuse
from preprocess.plan import SampleTask, ShardTask
from preprocess.text_plan import Caption, SharedTextTask, TextTask, identify
from shared.cache.commit import ShardWriter, commit_rows
from shared.cache.dataset import CommittedShard, Provenance
from shared.cache.fragments import SHARED_KIND
from shared.cache.layout import LATENT_STREAM
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.null_caption import write_null_caption
from shared.cache.rows import Place, Sample, Text, sample_row, shared_text_row, text_row
from shared.cache.schema import rows_table
from shared.encoders import t5, vae
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.errors import InputError
from shared.spec import latent_shape
from shared.stores.store import Store

_NOTHING_LEFT = "cleaning leaves nothing of {!r}: mend the caption or use --cleaning none in another cache"

CPU_THREADS = 1
"""Threads of an encoder on a CPU: fixed, since sums depend on their number. More workers use more cores."""


class Encoders:
    """T5 and, unless only texts are encoded, the VAE on one device.

    Args:
        config: Which models and how; resolved, so that both are named.

    Raises:
        InputError: if a model cannot be loaded, or the VAE's strides do not divide a bucket.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        assert config.text_encoder is not None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config, self._codecs = config, config.codecs()
        if self.device.type == "cpu":
            torch.set_num_threads(CPU_THREADS)
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" else "float32"
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        self.vae = None if config.only_texts else self._load_vae(dtype)
        self.text_encoder = TextEncoder.load(
            config.text_encoder,
            device=self.device,
            dtype=dtype,
            max_tokens=config.max_tokens,
            cleaning=config.cleaning,
        )

    def _load_vae(self, dtype: torch.dtype) -> VideoAutoencoder:
        config = self._config
        assert config.vae is not None
        geometry = vae.read_geometry(config.vae)
        for bucket in config.parsed_buckets():
            latent_shape(bucket, geometry)
        return VideoAutoencoder.load(
            config.vae,
            device=self.device,
            dtype=dtype,
            micro_batch=config.vae_micro_batch,
            posterior=config.posterior,
        )

    def provenance(self) -> Provenance:
        """Returns the provenance of the streams that are encoded."""
        made = {self._config.text_stream: self.text_encoder.provenance()}
        if self.vae is not None:
            made = {LATENT_STREAM: self.vae.provenance(), **made}
        return {stream: {**values, "codec": str(self._codecs[stream])} for stream, values in made.items()}

    def environment(self) -> dict[str, Any]:
        """Returns what else the bytes of a shard depend on; recorded beside each."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else f"cpu {platform.machine()}",
            "cpu_threads": None if on_gpu else CPU_THREADS,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "av": av.__version__,
            "pillow": PIL.__version__,
            "zstandard": zstandard.__version__,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            **t5.VERSIONS,
            **vae.VERSIONS,
        }

    def encode_null_caption(self, store: Store) -> None:
        """Stores the embedding of the empty caption, unless it is there."""
        write_null_caption(store, self._config.text_stream, self.text_encoder.encode([""])[0])

    def encode_shard(
        self,
        store: Store,
        task: ShardTask,
        clips: Iterable[np.ndarray | Refusal],
        shared: Mapping[str, Place] | None = None,
    ) -> Iterator[Refusal | CommittedShard | None]:
        """Encodes and commits one shard.

        Args:
            store: The cache's.
            task: What the shard holds.
            clips: For each sample of the task, in its order: frames (T, height, width, 3) uint8, or why there are none.
            shared: Where the texts lie that samples share, by identity, if they are stored apart.

        Yields:
            After each sample: None, or its refusal. At the end: the committed shard.
        """
        assert self.vae is not None
        texts = self._texts(
            {sample.sample: identify(sample.captions, self.text_encoder.clean) for sample in task.samples}, shared
        )
        refusals = []
        with self._writer(store, task.shard_id, str(task.bucket)) as writer:
            for sample, frames in zip(task.samples, clips, strict=True):
                if not texts[sample.sample] and not isinstance(frames, Refusal):
                    frames = refuse(sample, task.bucket, "no_caption_left", _NOTHING_LEFT.format(sample.captions[0]))
                if isinstance(frames, Refusal):
                    refusals.append(frames)
                    yield frames
                    continue
                try:
                    encoded = self._sample(sample, task, frames, texts[sample.sample])
                    row, arrays = sample_row(encoded, self._codecs, task.generation)
                except InputError as error:
                    refusals.append(refuse(sample, task.bucket, "not_storable", str(error)))
                    yield refusals[-1]
                    continue
                writer.add(row, arrays)
                yield None
            write_ledger(store, refusals)
            yield writer.commit()

    def _sample(self, sample: SampleTask, task: ShardTask, frames: np.ndarray, texts: tuple[Text, ...]) -> Sample:
        assert self.vae is not None
        return Sample(
            sample=sample.sample,
            source=sample.source,
            source_version=sample.source_version,
            bucket=task.bucket,
            frame_interval=sample.window.interval,
            fps=sample.fps,
            latent=self.vae.encode(frames, seed=sample.sample),
            texts={self._config.text_stream: texts},
            manifest=sample.columns,
        )

    def encode_texts(self, store: Store, task: TextTask, shared: Mapping[str, Place] | None = None) -> CommittedShard:
        """Encodes and commits new texts of committed samples; those that lie somewhere already are named only."""
        stream = self._config.text_stream
        texts = self._texts({sample.sample: sample.captions for sample in task.samples}, shared)
        generations = {sample.sample: sample.generation for sample in task.samples}
        rows = [
            text_row(sample, stream, parts, self._codecs[stream], generations[sample])
            for sample, parts in texts.items()
        ]
        if shared is not None:
            table = rows_table([row for row, _ in rows])
            created = commit_rows(store, task.shard_id, table, self._record())
            return CommittedShard(shard="", num_samples=len(rows), num_bytes=0, created=created)
        with self._writer(store, task.shard_id, stream) as writer:
            for row, arrays in rows:
                writer.add(row, arrays)
            return writer.commit()

    def encode_shared_texts(self, store: Store, task: SharedTextTask) -> CommittedShard:
        """Encodes and commits texts that samples share."""
        stream = self._config.text_stream
        with self._writer(store, task.shard_id, stream, kind=SHARED_KIND) as writer:
            for (text,) in self._texts({caption.id: (caption,) for caption in task.captions}, None).values():
                writer.add(*shared_text_row(stream, text, self._codecs[stream]))
            return writer.commit()

    def _texts(
        self, captions: Mapping[str, tuple[Caption, ...]], shared: Mapping[str, Place] | None
    ) -> dict[str, tuple[Text, ...]]:
        """Returns the texts of each key, embedded here or, if they are shared, where they lie."""
        if shared is not None:
            return {
                key: tuple(Text(id=text.id, caption=text.caption, embedding=shared[text.id]) for text in texts)
                for key, texts in captions.items()
            }
        embeddings = iter(self.text_encoder.encode([text.caption for texts in captions.values() for text in texts]))
        return {
            key: tuple(Text(id=text.id, caption=text.caption, embedding=next(embeddings)) for text in texts)
            for key, texts in captions.items()
        }

    def _record(self) -> dict[str, Any]:
        return {"clips_root": str(self._config.manifest.parent), "environment": self.environment()}

    def _writer(self, store: Store, shard_id: str, folder: str, kind: str = "samples") -> ShardWriter:
        return ShardWriter(
            store,
            shard_id=shard_id,
            folder=folder,
            container=self._config.container,
            record={**self._record(), "kind": kind},
        )
