"""Encoding clips while training, in place of a cache."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from shared.bucketing import PerClip
from shared.codec import Codec, stored_shape
from shared.encoders.captions import Cleaning
from shared.errors import InputError
from shared.media.manifest import parse_mapping
from shared.spec import Posterior
from train.config.settings import MayChange, require_at_least, require_positive

OnlineWindows = Literal["planned", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineOptions:
    """Clips of a manifest, decoded and encoded while the model trains. What python -m preprocess has too means the same
    here, so that batches hold what those of its cache would."""

    online: MayChange[str | None] = None
    """A manifest, as python -m preprocess takes it, in place of --cache; --buckets are then the sizes to encode."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="THEIRS=OURS ...")] = ()
    """The manifest's names for our columns, e.g. video=path caption=text."""
    ignore_columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Columns of the manifest to leave out."""
    vae: str | None = None
    """The autoencoder: a hub id or a folder; demo:vae is the tiny one of this package."""
    text_encoder: str | None = None
    """T5: a hub id or a folder; demo:t5 is the tiny one of this package."""
    buckets_per_clip: PerClip = "best"
    """best: each clip goes into one bucket that it fills; all: into every bucket that it fills."""
    frame_interval: int = 1
    """Take every N-th source frame."""
    fps: float | None = None
    """Take so many frames a second instead, by their times."""
    windows_per_clip: int = 1
    """Windows of a long clip, spread over it; --variants says what an epoch takes of them."""
    flip: bool = False
    """Take each window mirrored, too; --variants likewise."""
    online_windows: OnlineWindows = "planned"
    """planned: the windows that preprocess would encode; random: a fresh window of each clip every epoch."""
    max_tokens: int = 120
    """Longer captions are cut to this many T5 tokens."""
    cleaning: Cleaning = "deepfloyd"
    """How captions are cleaned before T5."""
    posterior: Posterior = "sample"
    """What is trained of the VAE's posterior: sample is the same one each epoch, as in a cache; mean+logvar is sampled
    anew each epoch."""
    latent_codec: str = "bfloat16+zstd"
    """Latents are rounded as this codec of a cache rounds them; float32 rounds nothing."""
    text_codec: str = "bfloat16+zstd"
    """Likewise, of captions' embeddings."""
    shard_samples: int | None = None
    """What preprocess was given, for the order of its cache's samples."""
    encoder_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoders compute in; auto: bfloat16 on GPUs, float32 on CPUs."""
    faster_t5: MayChange[bool] = True
    """T5 without padding, by kernels of our own; --no-faster-t5: transformers' own forward over padded captions."""
    faster_vae: MayChange[bool] = True
    """The autoencoder's fast form, on GPUs; --no-faster-vae: as its library runs it."""
    vae_micro_batch: int = 16
    """Frames a forward pass of the autoencoder."""
    probes: MayChange[str | None] = None
    """Where the true sizes and lengths of clips are kept, see python -m preprocess.probe; None: OUTPUT/probes."""
    decode_timeout: MayChange[float] = 300.0
    """Seconds after which a clip is given up."""
    decode_ahead_mb: MayChange[int] = 2048
    """Decoded frames that wait for each rank, at most; one batch more is decoded in any case."""

    def __post_init__(self) -> None:
        for option in fields(self):
            if self.online is None and (value := getattr(self, option.name)) != option.default:
                raise InputError(f"{option.name}={value} does nothing without --online")
        require_at_least(self, 1, "frame_interval", "windows_per_clip", "max_tokens", "shard_samples")
        require_at_least(self, 1, "vae_micro_batch", "decode_ahead_mb")
        require_positive(self, "fps", "decode_timeout")
        if not math.isfinite(self.fps or 0) or not math.isfinite(self.decode_timeout):
            raise InputError(f"fps={self.fps}, decode_timeout={self.decode_timeout}: expected finite numbers")
        if self.fps is not None and self.frame_interval != 1:
            raise InputError("--fps with --frame-interval: both choose the frames: drop one of the two")
        if self.online_windows == "random" and self.windows_per_clip != 1:
            raise InputError(f"windows_per_clip={self.windows_per_clip} does nothing with --online-windows random")
        parse_mapping(self.columns)
        stored_shape(Codec.parse(self.latent_codec), (1, 1, 1, 1))
        stored_shape(Codec.parse(self.text_codec), (1, 1))
        if self.online is not None:
            for name in ("vae", "text_encoder"):
                if getattr(self, name) is None:
                    raise InputError(f"--{name.replace('_', '-')} is missing: --online needs it: a hub id or a folder")
