"""The options of the estimator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared.bucket_presets import parse_buckets
from shared.cache.layout import Container
from shared.codec import Codec
from shared.costs import PEAK_TFLOPS, T5_XXL_CHANNELS
from shared.errors import InputError
from shared.spec import Bucket, Posterior
from storage_estimates.prices import DEFAULT_FILE

Preset = Literal["sd", "sdxl", "cogvideox", "wan2.1", "hunyuanvideo", "ltx", "dc-ae-f32c32", "dc-ae-f64c128"]
Gpu = Literal["H200", "H100", "A100", "L40S", "RTX 4090"]
assert set(PEAK_TFLOPS) == set(Gpu.__args__)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """What will a cache of T5 embeddings and VAE latents cost, and does it pay?

    Describe the samples (--clips), let a manifest describe them (--manifest, with --calibrate N also its clips), or
    start from an existing cache (--cache).
    """

    clips: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Samples to store, e.g. 10_000_000. With --cache: what to extrapolate its samples to."""
    frames: int = 16
    """Frames a sample."""
    size: str = "256"
    """Pixels: one number for a square, or HEIGHTxWIDTH."""
    tokens: int = 120
    """T5 tokens that a caption may have at most."""
    mean_tokens: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """T5 tokens that captions have on average. Without it every caption fills --tokens, and nothing is overlooked."""

    manifest: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """A manifest as preprocess takes it: its captions are counted in tokens, and some of its clips probed."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With --manifest: the text encoder's tokenizer: a hub id such as DeepFloyd/t5-v1_1-xxl, or a folder."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TxHxW ...")] = ()
    """With --manifest: sizes to encode, as preprocess takes them. Without it: one of --frames and --size."""
    buckets_per_clip: Literal["best", "all"] = "best"
    """With --manifest: each clip in the best bucket that it fills, or in all."""
    frame_interval: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """With --manifest: take every N-th source frame."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="THEIRS=OURS ...")] = ()
    """With --manifest: its names for our columns, each THEIRS=OURS, e.g. video=path caption=text."""
    cleaning: Literal["deepfloyd", "none"] = "deepfloyd"
    """With --manifest: how captions are cleaned before T5."""
    probe: Annotated[int, tyro.conf.arg(metavar="N")] = 200
    """With --manifest: clips to probe for their true size and length, taken at random; the rest counts as alike."""

    cache: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|URL")] = None
    """An existing cache: its bytes beside the estimate for its samples, and what --clips samples like these take."""

    calibrate: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """With --manifest: encode N of its clips and measure the codecs on them, in bits a value and dB."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With --calibrate: the autoencoder, as preprocess takes it."""
    text_encoder: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With --calibrate: the text encoder, as preprocess takes it."""
    device: str = "auto"
    """With --calibrate: where to encode: cpu, cuda, or auto."""

    vae_preset: Preset = "sd"
    """The autoencoder whose latents are stored."""
    text_channels: int = T5_XXL_CHANNELS
    """Width of a text embedding; 4096 is T5-XXL's."""
    latent_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """How latents are stored in the way that is costed. Without it: int8@40+delta+zstd, or the cache's."""
    text_codec: Annotated[str | None, tyro.conf.arg(metavar="CODEC")] = None
    """How embeddings are stored in the way that is costed. Without it: int8@30+zstd, or the cache's."""
    container: Container = "tar"
    """Of shards. With --cache: the cache's."""
    posterior: Posterior = "sample"
    """What is stored of the autoencoder's posterior; mean+logvar takes twice the bytes."""

    epochs: float = 5.0
    """Times that training sees every sample."""
    months: float = 3.0
    """For which the cache is kept."""
    gpu: Gpu = "H200"
    """On which encoders run. Rates were measured on the H200; others are scaled by their peak rates."""
    gpu_hour_price: Annotated[float | None, tyro.conf.arg(metavar="DOLLARS")] = None
    """Of one GPU. Without it: from the prices file."""
    vae_frames_per_second: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Your own rate of the autoencoder on one GPU, in frames of --size."""
    t5_tokens_per_second: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Your own rate of the text encoder on one GPU."""
    storage: Annotated[str, tyro.conf.arg(metavar="NAME")] = "s3-standard"
    """Storage class of the prices file that is costed."""
    egress: bool = False
    """Training is elsewhere than the storage: every byte read is charged as leaving it."""
    prices: Annotated[Path, tyro.conf.arg(metavar="FILE")] = DEFAULT_FILE
    """TOML file of prices."""

    all: bool = False
    """The long table: every autoencoder, codec, container and posterior."""
    json: bool = False
    """Print JSON."""
    csv: bool = False
    """Print the table as CSV."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Draw the sizes and the break-even."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        sources = [name for name in ("manifest", "cache") if getattr(self, name) is not None]
        if len(sources) > 1 or (not sources and self.clips is None):
            raise InputError("expected one of --clips N, --manifest URL and --cache FOLDER")
        for name in ("clips", "frames", "tokens", "text_channels", "probe", "calibrate", "frame_interval"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{_option(name)} {value}: expected at least 1")
        for name in ("gpu_hour_price", "vae_frames_per_second", "t5_tokens_per_second", "epochs", "months"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise InputError(f"{_option(name)} {value}: expected more than 0")
        if self.mean_tokens is not None and not 0 < self.mean_tokens <= self.tokens:
            raise InputError(f"--mean-tokens {self.mean_tokens}: expected more than 0, at most --tokens {self.tokens}")
        if self.json and self.csv:
            raise InputError("--json and --csv: expected one of them")
        self._check_manifest_options()
        self.bucket()
        self.wished_codecs()

    def _check_manifest_options(self) -> None:
        if self.manifest is not None and self.mean_tokens is not None:
            raise InputError("--mean-tokens with --manifest: its captions are counted: drop one of the two")
        if self.manifest is not None and self.tokenizer is None and self.text_encoder is None:
            raise InputError("--manifest without --tokenizer: expected the text encoder's, e.g. DeepFloyd/t5-v1_1-xxl")
        if self.manifest is None:
            for name in ("tokenizer", "buckets", "columns", "calibrate"):
                if getattr(self, name):
                    raise InputError(f"{_option(name)} without --manifest has no effect: drop it, or name a manifest")
        if self.calibrate is not None and (self.vae is None or self.text_encoder is None):
            raise InputError("--calibrate: expected --vae and --text-encoder, as preprocess takes them")
        if self.calibrate is None and (self.vae or self.text_encoder):
            raise InputError("--vae and --text-encoder without --calibrate N have no effect: add it, or drop them")

    def bucket(self) -> Bucket:
        """Returns the size of a sample."""
        height, cross, width = self.size.partition("x")
        try:
            return Bucket(self.frames, int(height), int(width if cross else height))
        except ValueError:
            raise InputError(f"--size {self.size!r}: expected a number of pixels or HEIGHTxWIDTH") from None

    def parsed_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets of a manifest's clips, each once."""
        return parse_buckets(self.buckets) or (self.bucket(),)

    def column_mapping(self) -> dict[str, str]:
        """Returns what the manifest calls our columns: its name -> ours."""
        from shared.media.manifest import parse_mapping  # pyarrow, which the arithmetic needs not

        return parse_mapping(self.columns)

    def wished_codecs(self) -> tuple[Codec | None, Codec | None]:
        """Returns the codecs of latents and of texts that were asked for, None for the usual."""
        latent = None if self.latent_codec is None else Codec.parse(self.latent_codec)
        text = None if self.text_codec is None else Codec.parse(self.text_codec)
        if text is not None and text.delta:
            raise InputError(f"--text-codec {text}: a text has no frames: write the codec without +delta")
        return latent, text


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
