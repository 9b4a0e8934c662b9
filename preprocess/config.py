"""The options of stage 1."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from preprocess.partition import Partition
from preprocess.report import Limit
from shared.bucket_presets import parse_buckets
from shared.cache.layout import LATENT_STREAM, Container, check_text_stream
from shared.clips.decode import Decoder
from shared.clips.reasons import check_retried
from shared.codec import Codec, stored_shape
from shared.encoders.captions import Cleaning
from shared.encoders.location import DEMO_PREFIX
from shared.errors import InputError
from shared.media.manifest import parse_mapping
from shared.spec import Bucket, Posterior

_POSITIVE = (
    "frame_interval",
    "windows_per_clip",
    "max_tokens",
    "vae_micro_batch",
    "shard_samples",
    "workers",
    "decode_ahead_mb",
)
_DEMO_MODELS = {"vae": f"{DEMO_PREFIX}vae", "text_encoder": f"{DEMO_PREFIX}t5"}
"""The tiny models, by the option that takes each."""
_OF_CLIPS = (
    *("prune", "frame_interval", "fps", "windows_per_clip", "flip", "probes", "check_sources", "decoder", "text_gpus"),
    *("vae_micro_batch", "retry_refused"),
)
"""Options that say something of clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """Encode the clips of a manifest into a cache of T5 embeddings and VAE latents, on Ray.

    Joins the Ray cluster that it finds (``--address``, the variable RAY_ADDRESS, or one on this machine) or starts one.
    Run again, it encodes only what is missing.
    """

    manifest: str
    """What to encode: a .csv, .parquet or .jsonl with the columns path and text (relative paths start at its folder),
    WebDataset shards (shards/{000..099}.tar), or a folder of clips with .txt files beside them. Local, or at s3://,
    gs://, az://, hf:// or https://. Rows of one path are one clip with several captions."""
    output: str
    """The cache: a folder on a file system that every node sees, or s3://bucket/prefix, gs:// or az://.
    Made if it does not exist."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TxHxW ...")]
    """Sizes to encode, each FRAMESxHEIGHTxWIDTH, e.g. 16x256x256, or a preset of such sizes, e.g. 16x240p."""

    preset: Literal["demo"] | None = None
    """demo: --vae demo:vae and --text-encoder demo:t5, tiny models that come with this package, for trying things out.
    Never for a real data set."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The autoencoder: a hub id such as stabilityai/sd-vae-ft-ema, or a folder (SD, SDXL, DC-AE, CogVideoX, Wan,
    HunyuanVideo, LTX, Open-Sora: see docs/autoencoders.md). Required without a preset."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """T5: a hub id such as DeepFloyd/t5-v1_1-xxl, or a folder. Required without a preset."""

    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="THEIRS=OURS ...")] = ()
    """The manifest's names for our columns, each THEIRS=OURS with OURS one of path, text, start, end, range, e.g.
    video=path caption=text."""
    ignore_columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Columns of the manifest to leave out."""
    buckets_per_clip: Literal["best", "all"] = "best"
    """best: each clip goes into one bucket that it fills: the nearest aspect ratio, then the most pixels.
    all: into every bucket that it fills."""
    frame_interval: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Take every N-th source frame. The frames come from the middle of the clip."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """Take F frames a second instead, by their times."""
    windows_per_clip: Annotated[int, tyro.conf.arg(metavar="K")] = 1
    """Encode up to K windows of a long clip, spread over it; the trainer takes another one each epoch."""
    flip: bool = False
    """Encode each window a second time, mirrored left to right."""
    probes: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Where the true sizes and lengths of clips are kept, a folder or an object-store prefix; python -m
    preprocess.probe writes there too. Without it: probes/ in the cache."""
    check_sources: bool = False
    """Look again whether probed files have changed."""

    max_tokens: int = 120
    """Longer captions are cut to this many T5 tokens."""
    cleaning: Cleaning = "deepfloyd"
    """How captions are cleaned before T5: deepfloyd as for the published models, or none."""
    posterior: Posterior = "sample"
    """What is stored of the VAE's posterior. mean+logvar takes twice the bytes; the trainer then samples anew each
    epoch."""
    latent_codec: Annotated[str, tyro.conf.arg(metavar="CODEC")] = "bfloat16+zstd"
    """How latents are stored: bfloat16+zstd loses nothing of bfloat16; int8@40+delta+zstd takes half of that, at 40 dB
    of signal to quantisation noise. See docs/codecs.md."""
    text_codec: Annotated[str, tyro.conf.arg(metavar="CODEC")] = "bfloat16+zstd"
    """How embeddings are stored, e.g. int8@30+zstd."""
    container: Container = "tar"
    """tar: WebDataset shards; zarr: Zarr v3 groups in zip files."""
    share_text: bool = False
    """Store a caption that several samples have once, apart from them. Readers then need the index."""
    text_stream: Annotated[str, tyro.conf.arg(metavar="text.NAME")] = "text.t5"
    """The stream of the texts; a second text encoder gets one of its own."""
    only_texts: bool = False
    """Encode captions of samples that are in the cache, and no clips: for a second text encoder, or new captions."""
    prune: bool = False
    """Remove samples of clips that changed or that the manifest names no more."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoders compute in. auto: bfloat16 on GPUs, float32 on CPUs."""
    vae_micro_batch: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Frames a forward pass of the VAE. Without it: the cache's own; for a new cache, what the memory holds."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the autoencoder by its fast form: kernels of our own, or torch.compile. auto: on GPUs."""

    shard_samples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples a shard, at most; what a killed worker loses. Without it: 256 MB, or a minute of a GPU."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Encoding workers. Without it: one a GPU of the cluster, or one if there is none."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where workers encode. auto: on GPUs if the cluster has some when the job starts; cuda: on GPUs, which may come
    later."""
    gpus_per_worker: Annotated[float, tyro.conf.arg(metavar="G")] = 1.0
    """GPUs that Ray sets aside for each encoding worker; 0.5 puts two on one."""
    text_gpus: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """GPUs for T5 alone; 0 runs T5 and the VAE on the same ones."""
    decoder: Decoder = "cpu"
    """What decodes video: the cluster's CPUs, the decoders of its GPUs (nvdec), or both (auto). NVDEC was five times
    slower than 16 cores, and conceals damage inside a frame that cpu refuses (docs/video.md)."""
    decode_ahead_mb: Annotated[int, tyro.conf.arg(metavar="MB")] = 2048
    """Decoded frames that wait for each worker, at most."""
    decode_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 300.0
    """A clip that takes longer to decode is refused."""
    worker_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 900.0
    """A worker that does not answer, or makes no step of encoding, for so long is ended; others get its shards."""
    resource_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
    """How long to wait for GPUs and CPUs that the cluster does not have free. With an autoscaler: longer than a node
    takes to come."""

    dry_run: bool = False
    """Say what would be encoded, in how many bytes and GPU hours, and stop."""
    retry_refused: Annotated[tuple[str, ...], tyro.conf.arg(metavar="REASON ...")] = ()
    """Try samples again that earlier runs refused for these reasons."""
    max_refused: Annotated[str, tyro.conf.arg(metavar="N | P%")] = "100%"
    """Exit with an error if more clips than this are refused."""
    partition: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Take only part I of N of the clips: for the jobs of a job array, which share the cache and no Ray cluster."""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Ray cluster to join."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        for name in ("fps", "gpus_per_worker", "decode_timeout", "worker_timeout", "resource_timeout"):
            if (value := getattr(self, name)) is not None and not (0 < value < math.inf):
                raise InputError(f"--{name.replace('_', '-')} {value}: expected a positive number")
        if self.gpus_per_worker > 1:
            raise InputError(f"--gpus-per-worker {self.gpus_per_worker}: a worker uses one GPU: expected at most 1")
        if self.text_gpus < 0:
            raise InputError(f"--text-gpus {self.text_gpus}: expected at least 0")
        if self.fps is not None and self.frame_interval != 1:
            raise InputError("--fps with --frame-interval: both choose the frames: drop one of the two")
        check_retried(self.retry_refused)
        Limit.parse(self.max_refused)
        if self.partition is not None:
            Partition.parse(self.partition)
            if self.prune:
                raise InputError("--prune with --partition: a part does not know the other clips: drop one of the two")
        check_text_stream(self.text_stream)
        latent_shape = (1, 1, 1, 1)  # any: that the codecs suit what they are for
        stored_shape(Codec.parse(self.latent_codec), latent_shape)
        stored_shape(Codec.parse(self.text_codec), latent_shape[:2])
        if self.only_texts:
            for name in _OF_CLIPS:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    option = f"--{name.replace('_', '-')}"
                    raise InputError(f"{option} with --only-texts: clips are not looked at then: drop one of the two")
        if not self.buckets:
            raise InputError("--buckets: found none: expected e.g. 16x256x256")
        self.parsed_buckets()
        self.column_mapping()
        for name in ("text_encoder",) if self.only_texts else ("vae", "text_encoder"):
            self._check_model(name)

    def _check_model(self, name: str) -> None:
        option, value = f"--{name.replace('_', '-')}", getattr(self, name)
        if self.preset is None and value is None:
            raise InputError(f"{option} is missing: expected a hub id or a folder (--preset demo brings tiny models)")
        if value is not None and value.startswith(DEMO_PREFIX) and value != _DEMO_MODELS[name]:
            raise InputError(f"{option} {value}: expected {_DEMO_MODELS[name]}, a hub id or a folder")
        if self.preset is not None and value not in (None, _DEMO_MODELS[name]):
            raise InputError(f"{option} {value}: --preset {self.preset} brings its own: drop one of the two")

    def parsed_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets, each once, in the order given."""
        return parse_buckets(self.buckets)

    def column_mapping(self) -> dict[str, str]:
        """Returns what the manifest calls our columns: its name -> ours."""
        return parse_mapping(self.columns)

    def codecs(self) -> dict[str, Codec]:
        """Returns the codecs, by stream."""
        return {LATENT_STREAM: Codec.parse(self.latent_codec), self.text_stream: Codec.parse(self.text_codec)}

    def streams(self) -> tuple[str, ...]:
        """Returns the streams that this job encodes."""
        return (self.text_stream,) if self.only_texts else (LATENT_STREAM, self.text_stream)

    def resolved(self) -> "PreprocessConfig":
        """Returns the same configuration with the preset's models in place."""
        if self.preset is None:
            return self
        return replace(self, vae=_DEMO_MODELS["vae"], text_encoder=_DEMO_MODELS["text_encoder"])
