"""All that a job has to do: clips to encode, texts to encode by themselves, samples that are stale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from preprocess.config import PreprocessConfig
from preprocess.plan import ShardTask, make_plan
from preprocess.text_plan import (
    SharedTextTask,
    TextTask,
    changed_texts,
    identify,
    shared_text_tasks,
    text_tasks,
)
from shared.cache.dataset import Cache, CommittedSample, Provenance
from shared.cache.layout import LATENT_STREAM
from shared.cache.ledger import Refusal
from shared.codec import raw_bytes
from shared.encoders.captions import clean_caption
from shared.errors import InputError
from shared.media.manifest import Clip, Manifest
from shared.media.probe import Probe
from shared.shard_size import most_samples_a_shard, samples_a_shard
from shared.spec import Bucket, VaeGeometry, latent_shape

_TEXTS_A_SHARD = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a job does, in the order in which it is done."""

    stream: str
    """The stream of texts."""
    share_text: bool
    shared_texts: Sequence[SharedTextTask]
    """Texts that samples share and that are not stored yet."""
    texts: Sequence[TextTask]
    """New texts of committed samples."""
    text_ids: Mapping[str, str]
    """If texts are shared, the identities of the captions of the shards' samples of which cleaning leaves something."""
    shards: Sequence[ShardTask]
    """Samples to encode."""
    refusals: Sequence[Refusal]
    """Clips that fill no bucket."""
    num_committed: int
    """Samples of the manifest that are in the cache already."""
    num_refused_before: int
    """Samples that an earlier run put into the ledger."""
    stale: Sequence[str]
    """Samples of clips that changed, or that the manifest names no more."""


def find_work(config: PreprocessConfig, manifest: Manifest, probed: Sequence[tuple[Clip, Probe]], cache: Cache) -> Work:
    """Returns what is to be done to bring the cache to what the manifest says.

    Args:
        config: The job's options, resolved.
        manifest: What it reads.
        probed: Its clips and their facts; none if only texts are encoded.
        cache: Opened by this job's provenance.

    Raises:
        InputError: if a shard would be too large, or the index cannot be read.
    """

    def clean(caption: str) -> str:
        return clean_caption(caption, config.cleaning)

    committed, removed = cache.committed_samples(config.text_stream)
    plan = make_plan(
        probed,
        sources={clip.source for clip in manifest.clips} | {row.source for row in manifest.refused},
        buckets=config.parsed_buckets(),
        buckets_per_clip=config.buckets_per_clip,
        frame_interval=config.frame_interval,
        shard_samples=lambda bucket: _shard_samples(config, bucket, cache.provenance),
        sample_bytes=lambda bucket, num_captions: _sample_bytes(config, bucket, num_captions, cache.provenance),
        streams=config.streams(),
        committed=committed,
        removed=removed,
        refused=set(cache.read_ledger()["sample"].drop_null().to_pylist()),
    )
    wanted = _known_sources(manifest, committed) if config.only_texts else plan.committed
    changed = changed_texts([(sample, clip.captions) for sample, clip in wanted], committed, clean)
    text_bytes = _text_bytes(config, cache.provenance)
    shared_tasks: list[SharedTextTask] = []
    text_ids: dict[str, str] = {}
    if config.share_text:
        captions = {caption for task in plan.tasks for sample in task.samples for caption in sample.captions}
        texts = [text for caption in sorted(captions) for text in identify([caption], clean)]
        text_ids = {text.caption: text.id for text in texts}
        shared_tasks = shared_text_tasks(
            [*(text for sample in changed for text in sample.captions), *texts],
            cache.shared_texts(config.text_stream),
            stream=config.text_stream,
            shard_texts=_TEXTS_A_SHARD,
            text_bytes=text_bytes,
        )
    return Work(
        stream=config.text_stream,
        share_text=config.share_text,
        shared_texts=shared_tasks,
        texts=text_tasks(
            changed,
            stream=config.text_stream,
            shard_samples=config.shard_samples or _TEXTS_A_SHARD,
            text_bytes=text_bytes,
        ),
        text_ids=text_ids,
        shards=plan.tasks,
        refusals=plan.refusals,
        num_committed=len(wanted),
        num_refused_before=plan.num_refused_before,
        stale=() if config.only_texts else plan.stale,
    )


def _known_sources(manifest: Manifest, committed: dict[str, CommittedSample]) -> Sequence[tuple[str, Clip]]:
    clips = {clip.source: clip for clip in manifest.clips}
    return [(sample, clips[known.source]) for sample, known in committed.items() if known.source in clips]


def _sample_bytes(config: PreprocessConfig, bucket: Bucket, num_captions: int, provenance: Provenance) -> int:
    """Returns the bytes of a sample before entropy coding, its texts of all their tokens if they are not shared."""
    latent = provenance[LATENT_STREAM]
    geometry = VaeGeometry(
        latent_channels=latent["latent_channels"] * (2 if config.posterior == "mean+logvar" else 1),
        spatial_stride=latent["spatial_stride"],
        temporal_stride=latent["temporal_stride"],
    )
    text_bytes = 0 if config.share_text else num_captions * _text_bytes(config, provenance)
    return raw_bytes(config.codecs()[LATENT_STREAM], latent_shape(bucket, geometry)) + text_bytes


def _text_bytes(config: PreprocessConfig, provenance: Provenance) -> int:
    text = provenance[config.text_stream]
    return raw_bytes(config.codecs()[config.text_stream], (text["max_tokens"], text["text_channels"]))


def _shard_samples(config: PreprocessConfig, bucket: Bucket, provenance: Provenance) -> int:
    """Returns how many samples of a bucket a shard has at most."""
    limits = {
        "sample_bytes": _sample_bytes(config, bucket, 1, provenance),
        "sample_pixels": bucket.num_frames * bucket.height * bucket.width,
    }
    if config.shard_samples is None:
        return samples_a_shard(**limits)
    most = most_samples_a_shard(**limits)
    if config.shard_samples > most:
        raise InputError(
            f"--shard-samples {config.shard_samples}: shards of bucket {bucket} would exceed 1 GB or three minutes of "
            f"a GPU: expected at most {most}"
        )
    return config.shard_samples
