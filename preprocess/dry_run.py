"""What a job would do, for people, before it does it: ``python -m preprocess --dry-run``.

Nothing is loaded but the models' configuration files, and nothing is written but what probing finds.
"""

from collections.abc import Sequence
from itertools import islice

from preprocess.config import PreprocessConfig
from preprocess.report import shown
from preprocess.tally import Tally
from preprocess.work import Work
from shared.cache.dataset import Cache, Provenance
from shared.cache.layout import DATASET_FILE, LATENT_STREAM
from shared.cache.schema import FORMAT_VERSION
from shared.clips.sizes import latent_bytes, shard_samples, text_bytes
from shared.costs import MEASURED_GPU, VAE_RATES, EncodeRate, gpu_seconds, t5_rate
from shared.encoders.vae_geometry import geometry_on_disk
from shared.spec import latent_shape
from shared.stores.open import open_store
from shared.wording import counted

_RATES_OF_CLASSES = {
    "AutoencoderKL": "sd",
    "AutoencoderKLCogVideoX": "cogvideox",
    "AutoencoderKLWan": "wan2.1",
    "AutoencoderKLHunyuanVideo": "hunyuanvideo",
    "AutoencoderKLLTXVideo": "ltx",
    "AutoencoderDC": "dc-ae-f32c32",
}
"""Which measured rate stands for autoencoders of a class."""
_LOOKED_AT = 10_000
"""Refused clips in which an example of each reason is looked for: a plan may refuse millions."""


def planned_provenance(config: PreprocessConfig) -> Provenance:
    """Returns what planning needs of the streams' provenance, from the models' configuration files.

    Args:
        config: The job's options, resolved.

    Raises:
        InputError: if a model's configuration cannot be read.
    """
    from shared.encoders.text_width import read_text_channels  # slow to import, and not wanted where a cache is there
    from shared.encoders.vae_files import read_config

    assert config.text_encoder is not None
    text = {"text_channels": read_text_channels(config.text_encoder), "max_tokens": config.max_tokens}
    made: Provenance = {config.text_stream: text}
    if not config.only_texts:
        assert config.vae is not None
        description = read_config(config.vae)
        geometry = description.family.geometry(description.config)
        made[LATENT_STREAM] = {
            "model_class": description.class_name,
            "latent_channels": geometry.latent_channels,
            "spatial_stride": geometry.spatial_stride,
            "temporal_stride": geometry.temporal_stride,
            "chunk_frames": geometry.chunk_frames,
        }
    return made


def cache_to_plan(config: PreprocessConfig) -> Cache:
    """Returns the job's cache, or, if there is none yet, what it would be; nothing is written.

    Args:
        config: The job's options, resolved.

    Raises:
        InputError: if the output holds something else, or a model's configuration cannot be read.
    """
    cache = _cache_that_is(config)
    if all(stream in cache.provenance for stream in config.streams()):
        return cache
    return Cache(cache.store, {**planned_provenance(config), **cache.provenance}, cache.version)


def check_sizes(config: PreprocessConfig) -> None:
    """Checks that the autoencoder takes the buckets, and shards of them so many samples as far as a cache is there.

    What decides it is the cache, or the autoencoder's configuration. Where this machine has neither, a job leaves it to
    its workers, which have the models.

    Args:
        config: The job's options, resolved.

    Raises:
        InputError: if a bucket or ``--shard-samples`` does not fit, or the output holds something else.
    """
    if config.only_texts:
        return
    provenance = _cache_that_is(config).provenance
    if all(stream in provenance for stream in config.streams()):
        for bucket in config.parsed_buckets():
            shard_samples(config, bucket, provenance)
        return
    assert config.vae is not None
    geometry = geometry_on_disk(config.vae)
    if geometry is not None:
        for bucket in config.parsed_buckets():
            latent_shape(bucket, geometry)


def _cache_that_is(config: PreprocessConfig) -> Cache:
    """Returns the job's cache; one without streams if there is none."""
    store = open_store(config.output)
    return Cache.open(config.output) if store.size(DATASET_FILE) is not None else Cache(store, {}, FORMAT_VERSION)


def planned_bytes(work: Work, config: PreprocessConfig, provenance: Provenance) -> int:
    """Returns the bytes that a job writes at most: before compression, every caption as long as it may be."""
    return sum(row.num_bytes for row in _rows(work, config, provenance))


def shortage(num_bytes: int, free_bytes: int | None, place: str) -> str | None:
    """Returns a note for people if the disk may not hold what a job writes; compression often makes it do.

    Args:
        num_bytes: See :func:`planned_bytes`.
        free_bytes: On the disk; None if the cache lies elsewhere.
        place: The cache.
    """
    if free_bytes is None or free_bytes >= num_bytes:
        return None
    return (
        f"note: up to {num_bytes:,} bytes may be written, and {place} has {free_bytes:,} free: make room there, or "
        "take smaller codecs (docs/codecs.md); what is committed stays if the disk is full"
    )


def _rows(work: Work, config: PreprocessConfig, provenance: Provenance) -> list["_Row"]:
    """Returns the lines of the table."""
    text_rate = t5_rate(provenance[config.text_stream]["text_channels"])
    max_tokens = provenance[config.text_stream]["max_tokens"]
    a_text = text_bytes(config, provenance)

    def text_hours(num_captions: int) -> float:
        return gpu_seconds(num_captions * max_tokens, text_rate) / 3600

    rows = []
    for bucket, totals in work.shards.per_bucket().items():
        rate = _vae_rate(provenance)
        pixels = totals.num_samples * bucket.num_frames * bucket.height * bucket.width
        num_texts = 0 if work.share_text else totals.num_captions
        hours = None if rate is None else gpu_seconds(pixels, rate) / 3600 + text_hours(num_texts)
        size = totals.num_samples * latent_bytes(config, bucket, provenance) + num_texts * a_text
        rows.append(_Row(str(bucket), totals.num_clips, totals.num_samples, totals.num_shards, size, hours))
    texts, shared = work.texts, work.shared_texts
    for name, tasks, num_texts, num_samples in (
        ("shared texts", shared, shared.num_members, 0),
        ("new texts", texts, 0 if work.share_text else texts.num_captions, texts.num_members),
    ):
        if tasks:
            rows.append(
                _Row(name, None, num_samples or num_texts, len(tasks), num_texts * a_text, text_hours(num_texts))
            )
    return rows


def dry_run(
    work: Work,
    config: PreprocessConfig,
    provenance: Provenance,
    tally: Tally | None = None,
    *,
    num_gpus: int = 0,
    free_bytes: int | None = None,
) -> str:
    """Returns a table of what would be encoded: clips, samples, shards, bytes and GPU hours by bucket, and refusals.

    Args:
        work: What is to be done.
        config: The job's options, resolved.
        provenance: Of the cache, or what planning needs of it.
        tally: Rows of the manifest and clips that were refused, or could not be looked at, before there was a plan.
        num_gpus: Of the cluster.
        free_bytes: On the disk of the cache; None if it lies elsewhere.
    """
    tally = tally or Tally()
    rows = _rows(work, config, provenance)
    max_tokens = provenance[config.text_stream]["max_tokens"]
    lines = _table([*rows, *_total(rows)])
    if rows:
        lines.append(
            f"Bytes before compression, every caption of {max_tokens} tokens: at most. {_hours(rows, config, num_gpus)}"
        )
    else:
        lines.append("Nothing to encode.")
    lines.append(f"Samples already in the cache: {work.num_committed:,}")
    if free_bytes is not None and rows:
        short = ": that may not be enough" * (free_bytes < sum(row.num_bytes for row in rows))
        lines.append(f"Bytes free where the cache lies: {free_bytes:,}{short}")
    if work.num_refused_before:
        lines.append(f"Samples refused by an earlier run: {work.num_refused_before:,}")
    if work.stale:
        lines.append(f"Samples of clips that changed or are named no more: {len(work.stale):,}")
    return "\n".join([*lines, *_refusals(work, tally)])


def _hours(rows: Sequence["_Row"], config: PreprocessConfig, num_gpus: int) -> str:
    """Returns whose hours the table has, and how long all of them take together."""
    of_one = f"Hours of one {MEASURED_GPU}"
    if not num_gpus:
        return f"{of_one}."
    told, used = f"{of_one}; the cluster has {counted(num_gpus, 'GPU')}", _gpus_used(config, num_gpus)
    hours = [row.hours for row in rows if row.hours is not None]
    if used == 0 or len(hours) < len(rows):
        return f"{told}."
    those = f"{used:g} of them" if used < num_gpus else "all"
    return f"{told}: {sum(hours) / used:,.3f} hours on {those}, if they are such."


def _gpus_used(config: PreprocessConfig, num_gpus: int) -> float:
    """Returns how many GPUs of a cluster a job sets aside."""
    if config.device == "cpu":
        return 0.0
    if config.workers is None:
        return float(num_gpus)
    texts = 0 if config.only_texts else config.text_gpus
    return min(float(num_gpus), config.workers * config.gpus_per_worker + texts)


def _refusals(work: Work, tally: Tally) -> list[str]:
    """Returns a line a reason, with the first that it was found of."""
    examples = dict(tally.examples)
    for refusal in islice(work.refusals, _LOOKED_AT):
        examples.setdefault(refusal.reason, refusal)
    lines = []
    for reason, count in (tally.refused + work.refusals.reasons()).most_common():
        example = f", e.g. {shown(examples[reason])}" if reason in examples else ""
        lines.append(f"Refused, {reason}: {count:,}{example}")
    for reason, count in tally.pending.most_common():
        example = f", e.g. {tally.pending_examples[reason]}" if reason in tally.pending_examples else ""
        lines.append(f"Not looked at, {reason}: {count:,}{example}")
    return lines


class _Row:
    """A line of the table."""

    def __init__(
        self,
        name: str,
        num_clips: int | None,
        num_samples: int,
        num_shards: int,
        num_bytes: int,
        hours: float | None,
    ) -> None:
        self.name, self.num_clips, self.num_samples = name, num_clips, num_samples
        self.num_shards, self.num_bytes, self.hours = num_shards, num_bytes, hours

    def cells(self) -> tuple[str, ...]:
        """Returns what is shown."""
        return (
            self.name,
            "" if self.num_clips is None else f"{self.num_clips:,}",
            f"{self.num_samples:,}",
            f"{self.num_shards:,}",
            f"{self.num_bytes:,}",
            "not measured" if self.hours is None else f"{self.hours:,.3f}",
        )


def _total(rows: Sequence[_Row]) -> list[_Row]:
    if len(rows) < 2:
        return []
    hours = [row.hours for row in rows]
    known = [hour for hour in hours if hour is not None]
    return [
        _Row(
            "all",
            None,
            sum(row.num_samples for row in rows),
            sum(row.num_shards for row in rows),
            sum(row.num_bytes for row in rows),
            sum(known) if len(known) == len(hours) else None,
        )
    ]


def _table(rows: Sequence[_Row]) -> list[str]:
    if not rows:
        return []
    cells = [("bucket", "clips", "samples", "shards", "bytes", "GPU hours"), *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _vae_rate(provenance: Provenance) -> EncodeRate | None:
    """Returns the measured rate of an autoencoder like this one, None if none was measured."""
    latent = provenance[LATENT_STREAM]
    name = _RATES_OF_CLASSES.get(latent.get("model_class", ""))
    return None if name is None else VAE_RATES[name]
