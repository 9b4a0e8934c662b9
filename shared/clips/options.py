"""Which options decide the samples and shards of a manifest: those that ``preprocess`` and online training share."""

from typing import Protocol

from shared.bucketing import PerClip
from shared.codec import Codec
from shared.spec import Bucket, Posterior


class EncodingOptions(Protocol):
    """Options of whatever encodes a manifest's clips; ``preprocess.config.PreprocessConfig`` describes each."""

    @property
    def buckets_per_clip(self) -> PerClip: ...
    @property
    def frame_interval(self) -> int: ...
    @property
    def fps(self) -> float | None: ...
    @property
    def windows_per_clip(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def posterior(self) -> Posterior: ...
    @property
    def share_text(self) -> bool: ...
    @property
    def text_stream(self) -> str: ...
    @property
    def shard_samples(self) -> int | None: ...

    def parsed_buckets(self) -> tuple[Bucket, ...]:
        """Returns the buckets, each once, in the order given."""
        ...

    def codecs(self) -> dict[str, Codec]:
        """Returns the codecs, by stream."""
        ...

    def streams(self) -> tuple[str, ...]:
        """Returns the streams that are encoded."""
        ...
