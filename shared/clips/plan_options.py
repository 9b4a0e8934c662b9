"""From the options of encoding to what a plan depends on."""

from shared.cache.dataset import Provenance
from shared.clips.options import EncodingOptions
from shared.clips.plan import PlanOptions
from shared.clips.sizes import sample_bytes, shard_samples
from shared.windows import Sampling


def plan_options(config: EncodingOptions, provenance: Provenance) -> PlanOptions:
    """Returns what of options decides the plan.

    Args:
        config: The options.
        provenance: Of its streams, as far as shapes need it: what ``VaeGeometry.recorded`` reads; ``max_tokens`` and
            ``text_channels``.
    """
    return PlanOptions(
        buckets=config.parsed_buckets(),
        buckets_per_clip=config.buckets_per_clip,
        sampling=Sampling(frame_interval=config.frame_interval, fps=config.fps),
        windows_per_clip=config.windows_per_clip,
        flip=config.flip,
        shard_samples=lambda bucket: shard_samples(config, bucket, provenance),
        sample_bytes=lambda bucket, num_captions: sample_bytes(config, bucket, num_captions, provenance),
        streams=config.streams(),
    )
