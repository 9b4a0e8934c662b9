"""All that a job has to do: clips to encode, texts to encode by themselves, samples that are stale."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocess.committed_clips import find_stale, known_clips
from preprocess.config import PreprocessConfig
from preprocess.text_plan import CaptionReader, SharedTextTasks, TextTasks, changed_texts
from shared.cache.committed import read_committed
from shared.cache.dataset import Cache
from shared.cache.resolve import sample_numbers
from shared.cache.shared_texts import SharedTexts
from shared.clips.plan import Plan, ShardTasks, make_plan
from shared.clips.plan_options import plan_options
from shared.clips.probes import rows_of_sources
from shared.clips.refusals import Refusals
from shared.clips.sizes import text_bytes
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
    shared_texts: SharedTextTasks
    """Texts that samples share and that are not stored yet."""
    texts: TextTasks
    """New texts of committed samples."""
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

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to encode."""
        return not (len(self.shards) or len(self.texts) or len(self.shared_texts))


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
    reader = CaptionReader(manifest, lambda caption: clean_caption(caption, config.cleaning))
    changed = changed_texts(samples, clips, manifest, committed, reader)
    a_text = text_bytes(config, cache.provenance)
    shared_tasks = SharedTextTasks(
        np.concatenate([plan.tasks.clip_rows(), changed.clips]) if config.share_text else np.empty(0, np.int64),
        reader,
        cache.shared_texts(config.text_stream) if config.share_text else SharedTexts((), ""),
        stream=config.text_stream,
        shard_texts=_TEXTS_A_SHARD,
        text_bytes=a_text,
    )
    is_whole = sources is None and config.partition is None
    return Work(
        stream=config.text_stream,
        share_text=config.share_text,
        shared_texts=shared_tasks,
        texts=TextTasks(
            changed,
            reader,
            stream=config.text_stream,
            shard_samples=config.shard_samples or _TEXTS_A_SHARD,
            text_bytes=a_text,
        ),
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
