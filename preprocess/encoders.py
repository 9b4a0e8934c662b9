"""The encoders of one worker: T5, the VAE or both on one device, and what they leave in a cache's provenance."""

import platform
from typing import Any

import av
import PIL
import torch
import zstandard

from preprocess.busy import BusyClock
from preprocess.config import PreprocessConfig
from preprocess.messages import MicroBatch, Role
from shared.cache.dataset import Provenance
from shared.cache.layout import LATENT_STREAM
from shared.cache.null_caption import write_null_caption
from shared.encoders import t5, vae
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.spec import latent_shape
from shared.stores.store import Store

CPU_THREADS = 1
"""Threads of an encoder on a CPU: fixed, since sums depend on their number. More workers use more cores."""


class Encoders:
    """T5 and the VAE on one device, or one of them.

    Args:
        config: Which models and how; resolved, so that both are named.
        role: Which of the two; without the VAE where only texts are encoded.
        micro_batch: Of the cache, if there is one; without it, as the options say, or what the memory holds.
        on_gpu: Whether a GPU is to be used; None: if there is one.

    Raises:
        InputError: if a model cannot be loaded, or the VAE's strides do not divide a bucket.
        RuntimeError: if there is no GPU and one is to be used.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        role: Role = "both",
        micro_batch: MicroBatch | None = None,
        on_gpu: bool | None = None,
    ) -> None:
        if on_gpu and not torch.cuda.is_available():
            raise RuntimeError("a GPU was set aside for this worker, and CUDA finds none")
        self.device = torch.device("cuda" if on_gpu is not False and torch.cuda.is_available() else "cpu")
        self._config, self.codecs = config, config.codecs()
        if self.device.type == "cpu":
            torch.set_num_threads(CPU_THREADS)
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" else "float32"
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        self.is_compiled = config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda")
        self.vae = None if config.only_texts or role == "text" else self._load_vae(micro_batch)
        self.text = None if role == "vae" else self._load_text()
        self.busy = BusyClock(self.device)
        self._tokens_taken = 0
        if self.vae is not None:
            self.vae.measure = self.busy.kernels("vae")
            self.vae.waiting = lambda: self.busy.measure("ahead")
        if self.text is not None:
            self.text.measure = self.busy.kernels("text")

    def _load_vae(self, micro_batch: MicroBatch | None) -> VideoAutoencoder:
        config = self._config
        assert config.vae is not None
        geometry = vae.read_geometry(config.vae)
        buckets = config.parsed_buckets()
        for bucket in buckets:
            latent_shape(bucket, geometry)
        if micro_batch is None:
            micro_batch = MicroBatch(frames=config.vae_micro_batch or vae.MICRO_BATCH, pixels=None)
            is_found = config.vae_micro_batch is None
        else:
            is_found = False
        loaded = VideoAutoencoder.load(
            config.vae,
            device=self.device,
            dtype=self._dtype,
            micro_batch=micro_batch.frames,
            micro_batch_pixels=micro_batch.pixels,
            posterior=config.posterior,
            compile=self.is_compiled,
            graphs=self.is_compiled,
        )
        if is_found:
            loaded.fit_micro_batch(max(buckets, key=lambda bucket: (bucket.height * bucket.width, bucket.num_frames)))
        return loaded

    def _load_text(self) -> TextEncoder:
        config = self._config
        assert config.text_encoder is not None
        return TextEncoder.load(
            config.text_encoder,
            device=self.device,
            dtype=self._dtype,
            max_tokens=config.max_tokens,
            cleaning=config.cleaning,
        )

    def provenance(self) -> Provenance:
        """Returns the provenance of the streams that are encoded here."""
        made: Provenance = {}
        if self.vae is not None:
            made[LATENT_STREAM] = self.vae.provenance()
        if self.text is not None:
            made[self._config.text_stream] = self.text.provenance()
        return {stream: {**values, "codec": str(self.codecs[stream])} for stream, values in made.items()}

    def environment(self) -> dict[str, Any]:
        """Returns what else the bytes of a shard depend on; recorded beside each."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else f"cpu {platform.machine()}",
            "compiled": self.is_compiled,
            "cpu_threads": None if on_gpu else CPU_THREADS,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            **({} if self._config.decoder == "cpu" else {"decoder": self._config.decoder}),
            "av": av.__version__,
            "pillow": PIL.__version__,
            "zstandard": zstandard.__version__,
            "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
            **t5.VERSIONS,
            **vae.VERSIONS,
        }

    def take_tokens(self) -> int:
        """Returns how many tokens of texts were encoded since the last call."""
        if self.text is None:
            return 0
        count, self._tokens_taken = self.text.num_tokens - self._tokens_taken, self.text.num_tokens
        return count

    def has_halved(self) -> bool:
        """Returns whether the memory did not hold a batch of the shard that was encoded last."""
        return any(getattr(encoder, "halved", False) for encoder in (self.vae, self.text))

    def encode_null_caption(self, store: Store) -> None:
        """Stores the embedding of the empty caption, unless it is there."""
        assert self.text is not None
        write_null_caption(store, self._config.text_stream, self.text.encode([""])[0])
