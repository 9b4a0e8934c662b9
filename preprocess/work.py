"""All that a job has to do: clips to encode, texts to encode by themselves, samples that are stale."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from preprocess.committed_clips import find_stale, known_clips
from preprocess.config import PreprocessConfig
from preprocess.text_plan import (
    SharedTextTask,
    TextTask,
    changed_texts,
    shared_text_tasks,
    text_tasks,
)
from shared.cache.committed import read_committed
from shared.cache.dataset import Cache
from shared.cache.resolve import sample_numbers
from shared.clips.plan import Plan, ShardTasks, make_plan
from shared.clips.plan_options import plan_options
from shared.clips.probes import rows_of_sources
from shared.clips.refusals import Refusals
from shared.clips.sizes import text_bytes
from shared.clips.texts import identify
from shared.encoders.captions import clean_caption
from shared.fingerprints import Lookup
from shared.media.manifest import Manifest

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
    shards: ShardTasks
    """Samples to encode."""
    refusals: Refusals
    """Clips that fill no bucket, or of which probing says that they cannot be used."""
    num_committed: int
    """Samples of the manifest that are in the cache already."""
    num_refused_before: int
    """Samples that an earlier run put into the ledger."""
    stale: Sequence[str]
    """Samples of clips that changed, or that the manifest names no more."""


def find_work(
    config: PreprocessConfig,
    manifest: Manifest,
    probes: pa.Table | None,
    cache: Cache,
    *,
    sources: Collection[str] | None = None,
) -> Work:
    """Returns what is to be done to bring the cache to what the manifest says.

    Args:
        config: The job's options, resolved.
        manifest: What it reads.
        probes: Of its clips, see ``shared.clips.probes.Probes.table_for``; None if only texts are encoded.
        cache: Opened by this job's provenance.
        sources: If only the clips of these are looked at: those that were probed anew, as decoding disagreed with what
            their probes said. Nothing is stale then.

    Raises:
        InputError: if a shard would be too large, or the index cannot be read.
    """

    def clean(caption: str) -> str:
        return clean_caption(caption, config.cleaning)

    committed = read_committed(cache, config.text_stream)
    plan = Plan.empty(manifest)
    if not config.only_texts:
        assert probes is not None
        plan = make_plan(
            manifest,
            probes,
            plan_options(config, cache.provenance),
            committed=committed.lookup,
            removed=committed.removed,
            refused=_refused(cache, config.retry_refused),
            rows=None if sources is None else rows_of_sources(manifest, sources),
        )
    samples, clips = known_clips(committed, manifest) if config.only_texts else plan.committed
    changed = changed_texts(samples, clips, manifest, committed, clean)
    a_text = text_bytes(config, cache.provenance)
    shared_tasks: list[SharedTextTask] = []
    text_ids: dict[str, str] = {}
    if config.share_text:
        rows = plan.tasks.clip_rows()
        clips_of = manifest.clips
        captions = {caption for row in rows.tolist() for caption in clips_of[row].captions}
        texts = [text for caption in sorted(captions) for text in identify([caption], clean)]
        text_ids = {text.caption: text.id for text in texts}
        shared_tasks = shared_text_tasks(
            [*(text for sample in changed for text in sample.captions), *texts],
            cache.shared_texts(config.text_stream),
            stream=config.text_stream,
            shard_texts=_TEXTS_A_SHARD,
            text_bytes=a_text,
        )
    is_whole = sources is None and config.partition is None
    return Work(
        stream=config.text_stream,
        share_text=config.share_text,
        shared_texts=shared_tasks,
        texts=text_tasks(
            changed,
            stream=config.text_stream,
            shard_samples=config.shard_samples or _TEXTS_A_SHARD,
            text_bytes=a_text,
        ),
        text_ids=text_ids,
        shards=plan.tasks,
        refusals=plan.refusals,
        num_committed=len(samples),
        num_refused_before=plan.num_refused_before,
        stale=find_stale(committed, samples, manifest, probes) if probes is not None and is_whole else (),
    )


def _refused(cache: Cache, retried: Collection[str]) -> Lookup:
    """Returns the samples that are in the ledger for another reason than those that are tried again."""
    ledger = cache.read_ledger()
    reasons = pc.is_in(ledger["reason"], pa.array(list(retried), pa.string()))
    samples = ledger["sample"].filter(pc.invert(reasons)).drop_null()
    return Lookup(sample_numbers(samples))
