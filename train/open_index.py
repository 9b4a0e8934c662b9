"""The samples of a run: those of its cache, or of a manifest that it encodes itself."""

import sys

import torch

from shared.cache.dataset import Cache
from shared.errors import InputError
from shared.wording import counted
from train.chosen_rows import Selection
from train.config import TrainConfig
from train.online.encoding import OnlineEncoding
from train.online.index import OnlineIndex, open_probes, probe_manifest, read_clips
from train.parallel.ranks import Ranks
from train.run_folder import require_own_folder
from train.sample_index import IndexedSamples, SampleIndex


def prepare_source(config: TrainConfig, ranks: Ranks) -> None:
    """Finds out, once a run, what the clips of a manifest really are. Nothing is to be done for a cache.

    Raises:
        InputError: if the manifest cannot be read, or the output folder holds something else.
    """
    if config.encoding.online is None or not ranks.is_first:
        return
    require_own_folder(config.output)
    encoding = OnlineEncoding.of(config.encoding, config.data.buckets)
    unseen = probe_manifest(encoding, config.output, num_workers=config.data.num_workers)
    for clip in unseen[:10]:
        print(f"{clip.source}: {clip.reason}: {clip.detail}: left out", file=sys.stderr)
    if len(unseen) > 10:
        print(f"and {counted(len(unseen) - 10, 'more clip')} that could not be looked at: left out", file=sys.stderr)


def open_index(config: TrainConfig, device: torch.device | None) -> IndexedSamples:
    """Returns the samples that a run trains on.

    Args:
        config: Of the run.
        device: Where encoders run, if they are needed; None: nowhere.

    Raises:
        InputError: if there is no sample, or options and source do not suit each other.
    """
    data = config.data
    selection = Selection(where=data.where, holdout=data.holdout)
    if config.cache is not None:
        cache = Cache.open(config.cache)
        return SampleIndex.open(cache, selection, variants=data.variants, local_cache=data.local_cache)
    if device is None:
        raise InputError("--dry-run with --online: what the encoders take is not predicted: plan with a cache")
    from train.online.encoders import OnlineEncoders  # loads transformers and diffusers: not for a cache

    encoding = OnlineEncoding.of(config.encoding, data.buckets)
    return OnlineIndex.open(
        encoding,
        OnlineEncoders(encoding, device),
        read_clips(encoding),
        open_probes(encoding, config.output),
        selection,
        variants=data.variants,
        local_cache=data.local_cache,
    )
