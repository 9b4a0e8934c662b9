"""Encodes a few clips, as stage 1 would, to see how their latents and embeddings compress."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.encoders.captions import Cleaning
from shared.encoders.t5 import TextEncoder
from shared.encoders.vae import VideoAutoencoder
from shared.media.clip import Media, TimeRange, Window
from shared.media.refusal import MediaError
from shared.media.video import decode_window
from shared.spec import Bucket, Posterior, VaeGeometry


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipToEncode:
    """A clip and the bucket that it goes into."""

    media: Media
    time_range: TimeRange | None
    window: Window
    bucket: Bucket
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedClips:
    """What encoders gave."""

    latents: list[torch.Tensor]  # (C, T, H, W), or (2C, T, H, W), each
    texts: list[torch.Tensor]  # (L, D) each
    geometry: VaeGeometry
    text_channels: int
    num_unreadable: int


def encode_clips(
    clips: Sequence[ClipToEncode],
    *,
    vae: str,
    text_encoder: str,
    device: str,
    max_tokens: int,
    cleaning: Cleaning,
    posterior: Posterior,
) -> EncodedClips:
    """Returns the latents and embeddings of some clips, on the CPU.

    Args:
        clips: Those that cannot be decoded are left out and counted.
        vae: As preprocess takes it.
        text_encoder: Likewise.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if there is one. On GPUs encoders compute in bfloat16.
        max_tokens: Longer captions are cut.
        cleaning: Of captions.
        posterior: What is stored.

    Raises:
        InputError: if there is no such model.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    autoencoder = VideoAutoencoder.load(vae, device=device, dtype=dtype, posterior=posterior)
    embedder = TextEncoder.load(text_encoder, device=device, dtype=dtype, max_tokens=max_tokens, cleaning=cleaning)
    latents: list[torch.Tensor] = []
    captions: list[str] = []
    unreadable = 0
    for clip in clips:
        try:
            frames = decode_window(clip.media, clip.time_range, clip.window, clip.bucket)
        except MediaError:
            unreadable += 1
            continue
        latents.append(autoencoder.encode(frames, seed=str(clip.media)).cpu())
        captions.extend(caption for caption in clip.captions if embedder.clean(caption))
    return EncodedClips(
        latents=latents,
        texts=[text.float().cpu() for text in embedder.encode(captions)],
        geometry=autoencoder.geometry,
        text_channels=embedder.channels,
        num_unreadable=unreadable,
    )
