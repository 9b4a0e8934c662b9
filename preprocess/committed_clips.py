"""Which clips of a manifest the samples of a cache are of, and which samples are of none of them any more."""

import numpy as np
import pyarrow as pa

from shared.cache.committed import CommittedSamples
from shared.cache.identity import identity_texts
from shared.clips.probe_parts import clip_keys
from shared.fingerprints import Lookup, fingerprints
from shared.media.manifest import Manifest
from shared.windows import Integers


def known_clips(committed: CommittedSamples, manifest: Manifest) -> tuple[Integers, Integers]:
    """Returns the samples (M,) of clips that a manifest names, by their rows, and the rows (M,) of those clips."""
    named = Lookup(clip_keys(manifest.table))
    samples, clips = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows, table in committed.clips(np.arange(len(committed))):
        found = named.find(clip_keys(table))
        samples.append(rows[found >= 0])
        clips.append(found[found >= 0])
    return np.concatenate(samples), np.concatenate(clips)


def find_stale(committed: CommittedSamples, planned: Integers, manifest: Manifest, probes: pa.Table) -> list[str]:
    """Returns the samples of clips that changed, or that the manifest names no more.

    A sample of a clip that is named and cannot be probed is not stale.

    Args:
        committed: Of the cache.
        planned: Rows of samples that a plan of the whole manifest has found committed.
        manifest: Of the job.
        probes: Of its rows.
    """
    is_open = np.ones(len(committed), bool)
    is_open[planned] = False
    if not is_open.any():
        return []
    named = Lookup(clip_keys(manifest.table))
    refused = Lookup(fingerprints(pa.array([row.source for row in manifest.refused], pa.string())))
    stale: list[str] = []
    for rows, table in committed.clips(np.flatnonzero(is_open)):
        clips = named.find(clip_keys(table))
        is_stale = (clips < 0) & (refused.find(fingerprints(table["source"])) < 0)
        probed = np.flatnonzero(clips >= 0)
        now = probes["version"].take(pa.array(clips[probed]))
        differs = fingerprints(now) != fingerprints(table["source_version"].take(pa.array(probed)))
        is_stale[probed] = differs & now.is_valid().to_numpy()
        stale.extend(identity_texts(committed.numbers[rows[is_stale]]))
    return stale
