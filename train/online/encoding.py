"""What of a run's options decides how a manifest is encoded online."""

from dataclasses import dataclass, fields

from shared.bucket_presets import parse_buckets
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.codec import Codec
from shared.errors import InputError
from shared.spec import Bucket
from shared.windows import Sampling
from train.config.online import OnlineOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineEncoding(OnlineOptions):
    """The options of encoding online, with the sizes: ``shared.clips.options.EncodingOptions`` for a plan."""

    buckets: tuple[str, ...]
    """Sizes to encode, each FRAMESxHEIGHTxWIDTH, or presets of them."""

    @classmethod
    def of(cls, options: OnlineOptions, buckets: tuple[str, ...]) -> "OnlineEncoding":
        """Returns the options of a run with its ``--buckets``.

        Raises:
            InputError: if there is no bucket, or one that cannot be.
        """
        if not buckets:
            raise InputError("--buckets: found none: --online needs the sizes to encode, e.g. 16x256x256")
        parse_buckets(buckets)
        values = {option.name: getattr(options, option.name) for option in fields(OnlineOptions)}
        return cls(**values, buckets=buckets)

    @property
    def manifest(self) -> str:
        """The manifest."""
        assert self.online is not None
        return self.online

    @property
    def share_text(self) -> bool:
        """As shards of a cache are cut that stores each sample with its own texts."""
        return False

    @property
    def text_stream(self) -> str:
        """The stream that is trained on."""
        return TEXT_STREAM

    @property
    def sampling(self) -> Sampling:
        """How frames are taken."""
        return Sampling(frame_interval=self.frame_interval, fps=self.fps)

    def parsed_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets, each once, in the order given."""
        return parse_buckets(self.buckets)

    def codecs(self) -> dict[str, Codec]:
        """Returns the codecs, by stream."""
        return {LATENT_STREAM: Codec.parse(self.latent_codec), TEXT_STREAM: Codec.parse(self.text_codec)}

    def streams(self) -> tuple[str, ...]:
        """Returns the streams that are encoded."""
        return (LATENT_STREAM, TEXT_STREAM)
