"""The encoders of stage 1 beside a model in training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache.dataset import Provenance
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.cache.payload import decode, decoded_dtype, encode
from shared.codec import Codec
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.spec import latent_shape
from train.online.encoding import OnlineEncoding


class OnlineEncoders:
    """T5 and an autoencoder on the device of the training.

    Args:
        encoding: Which models and how.
        device: Where they run.

    Raises:
        InputError: if a model cannot be loaded, or a bucket does not suit the autoencoder.
    """

    def __init__(self, encoding: OnlineEncoding, device: torch.device) -> None:
        assert encoding.vae is not None
        assert encoding.text_encoder is not None
        precision = encoding.encoder_precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        self.device = device
        self.codecs = encoding.codecs()
        self.vae = VideoAutoencoder.load(
            encoding.vae,
            device=device,
            dtype=dtype,
            micro_batch=encoding.vae_micro_batch,
            posterior=encoding.posterior,
            compile=encoding.faster_vae and device.type == "cuda",
        )
        for bucket in encoding.parsed_buckets():
            latent_shape(bucket, self.vae.geometry)
        self.text = TextEncoder.load(
            encoding.text_encoder,
            device=device,
            dtype=dtype,
            max_tokens=encoding.max_tokens,
            cleaning=encoding.cleaning,
            faster=encoding.faster_t5,
        )

    def provenance(self) -> Provenance:
        """Returns the provenance that a cache of these encoders would have, by stream."""
        made: dict[str, dict[str, Any]] = {LATENT_STREAM: self.vae.provenance(), TEXT_STREAM: self.text.provenance()}
        return {stream: {**values, "codec": str(self.codecs[stream])} for stream, values in made.items()}

    def encode_clips(self, clips: Sequence[tuple[str, np.ndarray]]) -> Tensor:
        """Returns latents (B, C or 2C, T, H, W) on the device, as the codec rounds them.

        Args:
            clips: Of each its identity, which seeds the posterior's noise, and its frames (T, height, width, 3), uint8;
                all of one shape.
        """
        latents = torch.stack([latent for _, latent in self.vae.encode_each(clips)])
        return self._rounded(latents, self.codecs[LATENT_STREAM])

    def encode_captions(self, captions: Sequence[list[int]]) -> list[Tensor]:
        """Returns embeddings (L, D) on the device, as the codec rounds them.

        Args:
            captions: Token ids; equal ones are encoded once.
        """
        distinct = sorted(set(map(tuple, captions)), key=lambda ids: (len(ids), ids))
        embeddings = self.text.embed([list(ids) for ids in distinct])
        codec = self.codecs[TEXT_STREAM]
        rounded = [self._rounded(embedding[None], codec)[0] for embedding in embeddings]
        by_ids = dict(zip(distinct, rounded, strict=True))
        return [by_ids[tuple(ids)] for ids in captions]

    def _rounded(self, values: Tensor, codec: Codec) -> Tensor:
        """Returns what a loader would deliver of (B, ...) values that were stored by a codec."""
        if codec.values == "int8":  # steps depend on the values: by the codec itself, on the CPU
            parts = [decode(encode(part, codec), codec, tuple(part.shape)) for part in values.cpu()]
            return torch.stack(parts).to(values.device)
        stored = decoded_dtype(codec)
        return values.to(stored).to(torch.float32 if stored is torch.float32 else torch.bfloat16)
