"""Encoding one shard: decoded clips through T5 and the VAE into the cache. No Ray here.

Every latent depends on its own clip only, and every embedding on its own caption; batches never reach over a shard. So
a shard's bytes are the same on any number of workers.
"""

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL
import torch

from preprocess.config import PreprocessConfig
from preprocess.decode import refuse
from preprocess.plan import ShardTask
from shared.cache.commit import Sample, ShardWriter
from shared.cache.dataset import CommittedShard, Provenance
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.cache.ledger import Refusal, write_ledger
from shared.encoders import t5, vae
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.errors import InputError
from shared.spec import latent_shape

_NOTHING_LEFT = "cleaning leaves nothing of {!r}: mend the caption or use --cleaning none in another cache"

CPU_THREADS = 1
"""Threads of an encoder on a CPU: fixed, since sums depend on their number. More workers use more cores."""


class Encoders:
    """T5 and the VAE on one device.

    Args:
        config: Which models and how; resolved, so that both are named.

    Raises:
        InputError: if a model cannot be loaded, or the VAE's strides do not divide a bucket.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        assert config.vae is not None
        assert config.text_encoder is not None
        geometry = vae.read_geometry(config.vae)
        for bucket in config.parsed_buckets():
            latent_shape(bucket, geometry)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config = config
        if self.device.type == "cpu":
            torch.set_num_threads(CPU_THREADS)
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" else "float32"
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        self.vae = VideoAutoencoder.load(
            config.vae, device=self.device, dtype=dtype, micro_batch=config.vae_micro_batch
        )
        self.text_encoder = TextEncoder.load(
            config.text_encoder,
            device=self.device,
            dtype=dtype,
            max_tokens=config.max_tokens,
            cleaning=config.cleaning,
        )

    def provenance(self) -> Provenance:
        """Returns the provenance of both streams."""
        return {LATENT_STREAM: self.vae.provenance(), TEXT_STREAM: self.text_encoder.provenance()}

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
            **t5.VERSIONS,
            **vae.VERSIONS,
        }

    def encode_shard(
        self, root: Path, task: ShardTask, clips: Iterable[np.ndarray | Refusal]
    ) -> Iterator[Refusal | CommittedShard | None]:
        """Encodes and commits one shard.

        Args:
            root: The cache's folder.
            task: What the shard holds.
            clips: For each sample of the task, in its order: frames (T, height, width, 3) uint8, or why there are none.

        Yields:
            After each sample: None, or its refusal. At the end: the committed shard.
        """
        clean = self.text_encoder.clean
        kept = [tuple(caption for caption in sample.captions if clean(caption)) for sample in task.samples]
        embeddings = iter(self.text_encoder.encode([caption for captions in kept for caption in captions]))
        refusals = []
        with ShardWriter(
            root,
            shard_id=task.shard_id,
            bucket=task.bucket,
            codec=self._config.codec,
            clips_root=self._config.manifest.parent,
            environment=self.environment(),
        ) as writer:
            for sample, captions, frames in zip(task.samples, kept, clips, strict=True):
                texts = tuple(next(embeddings) for _ in captions)
                if not captions and not isinstance(frames, Refusal):
                    frames = refuse(sample, task.bucket, "no_caption_left", _NOTHING_LEFT.format(sample.captions[0]))
                if isinstance(frames, Refusal):
                    refusals.append(frames)
                    yield frames
                    continue
                encoded = Sample(
                    sample=sample.sample,
                    source=sample.source,
                    source_version=sample.source_version,
                    bucket=task.bucket,
                    frame_interval=sample.window.interval,
                    fps=sample.fps,
                    captions=captions,
                    cleaned_captions=tuple(clean(caption) for caption in captions),
                    latent=self.vae.encode(frames, seed=sample.sample),
                    texts=texts,
                )
                try:
                    writer.add(encoded)
                except InputError as error:
                    refusals.append(refuse(sample, task.bucket, "not_storable", str(error)))
                    yield refusals[-1]
                    continue
                yield None
            write_ledger(root, refusals)
            yield writer.commit()
