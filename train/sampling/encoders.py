"""The encoders of a cache, for sampling: prompts to embeddings, latents to frames, a clip's head to latents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.errors import InputError
from shared.media.clip import Media, Window
from shared.media.refusal import MediaError
from shared.media.video import decode_window, presentation_times
from shared.spec import Bucket, VaeGeometry, latent_shape
from shared.wording import counted
from train.sample_index import LATENT, TEXT
from train.sampling.latents import Head

DECODE_FRAMES = 16
"""Most frames that are decoded at once, where the autoencoder can take a part of a clip."""
_TIMES_SLACK = 1e-4
"""Seconds by which a frame may seem to come too late for want of exact arithmetic."""

Provenance = Mapping[str, Mapping[str, Any]]


def encode_prompts(provenance: Provenance, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
    """Returns the embedding (L, D) of each prompt, float32, by the cache's own text encoder.

    Raises:
        InputError: if the encoder cannot be found, or has other weights than the cache's.
    """
    from shared.encoders.t5 import TextEncoder  # imports transformers: not for --help

    recorded = provenance[TEXT]
    encoder = TextEncoder.load(
        recorded["model"],
        device=device,
        dtype=getattr(torch, recorded["precision"]),
        max_tokens=recorded["max_tokens"],
        cleaning=recorded["cleaning"],
    )
    _require_same_weights(TEXT, recorded, encoder.provenance())
    return [embedding.float() for embedding in encoder.encode(list(prompts))]


def load_autoencoder(provenance: Provenance, device: torch.device) -> Any:
    """Returns the cache's own autoencoder.

    Raises:
        InputError: if it cannot be found, or has other weights than the cache's.
    """
    from shared.encoders.vae import VideoAutoencoder  # imports diffusers: not for --help

    recorded = provenance[LATENT]
    vae = VideoAutoencoder.load(
        recorded["model"], device=device, dtype=getattr(torch, recorded["precision"]), posterior="mean"
    )
    _require_same_weights(LATENT, recorded, vae.provenance())
    return vae


def _require_same_weights(stream: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for key in ("weights_sha256", "scaling_factor", "shift_factor"):
        if recorded.get(key) != found.get(key):
            raise InputError(
                f"encoder {recorded['model']!r} of stream {stream!r}: the cache has {key}={recorded.get(key)}, "
                f"the model found has {found.get(key)}: put the cache's model in its place"
            )


def require_slices(geometry: VaeGeometry, decode_frames: int | None) -> None:
    """Raises :class:`InputError` if a number of frames is asked for that the autoencoder cannot keep to."""
    if decode_frames is None:
        return
    if geometry.temporal_stride > 1 and geometry.chunk_frames is None:
        raise InputError(
            f"decode_frames={decode_frames}: this autoencoder decodes a clip whole, since each frame depends on those "
            "before: leave it out"
        )
    if geometry.chunk_frames is not None and decode_frames < geometry.chunk_frames:
        raise InputError(
            f"decode_frames={decode_frames}: this autoencoder decodes chunks of {geometry.chunk_frames} frames: use a "
            "multiple of that"
        )


def slices(geometry: VaeGeometry, num_frames: int, decode_frames: int) -> Iterator[tuple[slice, int]]:
    """Yields the parts in which a clip can be decoded without a change: latent frames, and frames that they make.

    Args:
        geometry: Image autoencoders decode frames, those with chunks decode chunks, others whole clips.
        num_frames: Of the clip.
        decode_frames: Most frames of a part; a chunk at least.
    """
    if geometry.temporal_stride > 1 and geometry.chunk_frames is None:
        yield slice(None), num_frames
        return
    step = decode_frames
    if geometry.chunk_frames is not None:
        step = max(1, decode_frames // geometry.chunk_frames) * geometry.chunk_frames
    begin = 0
    for start in range(0, num_frames, step):
        frames = min(step, num_frames - start)
        count = latent_shape(Bucket(frames, geometry.spatial_stride, geometry.spatial_stride), geometry)[1]
        yield slice(begin, begin + count), frames
        begin += count


def decode_latent(
    decode: Callable[[Tensor, int], np.ndarray],
    latent: Tensor,
    geometry: VaeGeometry,
    num_frames: int,
    decode_frames: int | None = None,
) -> np.ndarray:
    """Returns the frames (T, height, width, 3), uint8, of a latent (C, T', H, W), decoded part by part.

    Args:
        decode: The autoencoder's: takes latents and the number of frames that they make.
        latent: On any device.
        geometry: Of the autoencoder.
        num_frames: T.
        decode_frames: Most frames of a part; None: ``DECODE_FRAMES``.
    """
    parts = slices(geometry, num_frames, decode_frames or DECODE_FRAMES)
    return np.concatenate([decode(latent[:, part], frames) for part, frames in parts])


def encode_head(
    vae: Any, file: Path, bucket: Bucket, geometry: VaeGeometry, *, fps: float, num_frames: int | None = None
) -> Head:
    """Returns the latents with which a clip begins: an image, or the last frames of a video.

    Args:
        vae: The cache's autoencoder.
        file: The image or video.
        bucket: Of the clip to make.
        geometry: Of the autoencoder.
        fps: At which frames of a video are taken.
        num_frames: How many. None: as many as make a quarter of the clip's latent frames, of an image one.

    Raises:
        InputError: if the file cannot be read, has not so many frames, or nothing would be left to make.
    """
    media = Media(url=str(file.absolute()))
    all_frames = latent_shape(bucket, geometry)[1]
    try:
        times = presentation_times(media)
        is_image = len(times) == 1
        if num_frames is None:
            num_frames = 1 if is_image else (max(1, all_frames // 4) - 1) * geometry.temporal_stride + 1
        head = Bucket(num_frames, bucket.height, bucket.width)
        given = latent_shape(head, geometry)[1]
        if given >= all_frames:
            raise InputError(
                f"condition_frames={num_frames}: they make {given} of the clip's {all_frames} latent frames: expected "
                "fewer, so that some are left to make"
            )
        start = 0 if is_image else int((times[-1] + _TIMES_SLACK) * fps) - (num_frames - 1)
        if start < 0 or (is_image and num_frames > 1):
            held = 1 if is_image else int((times[-1] + _TIMES_SLACK) * fps) + 1
            raise InputError(
                f"{file}: asked for {counted(num_frames, 'frame')}, and it has {held} at {fps:g} a second: lower "
                "--condition-frames"
            )
        window = Window(start=start, num_frames=num_frames, fps=None if is_image else fps)
        frames = decode_window(media, None, window, head)
    except MediaError as error:
        raise InputError(f"--condition {file}: {error.detail}: expected an image or a video") from None
    return Head(latents=vae.encode(frames, seed=str(file)))
