"""What a manifest's clips will give: its captions counted in tokens, some of its clips probed, some of them encoded."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from shared.bucketing import buckets_of
from shared.encoders.tokens import count_tokens
from shared.errors import InputError
from shared.media.clip import Clip
from shared.media.manifest import read_manifest
from shared.media.probe import Probe, probe
from shared.media.refusal import MediaError
from shared.spec import Bucket
from shared.wording import counted
from storage_estimates.bits import BitsTable
from storage_estimates.calibrate import calibrate
from storage_estimates.config import EstimateConfig
from storage_estimates.estimate import Group
from storage_estimates.samples import Samples

_MAX_COUNTED = 50_000
"""Clips whose captions are counted; of more, so many taken at random. The mean is then good to a part in a hundred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedClips:
    """Clips that were looked at, and the buckets into which they go."""

    probed: list[tuple[Clip, Probe, list[Bucket]]]
    num_unusable: int
    """Not readable, or too short or small for every bucket."""


def samples_of_manifest(config: EstimateConfig) -> Samples:
    """Returns the samples that stage 1 would make of a manifest.

    Raises:
        InputError: if the manifest cannot be read, or none of the probed clips can be used.
    """
    assert config.manifest is not None
    manifest = read_manifest(config.manifest, columns=config.column_mapping())
    if not manifest.clips:
        raise InputError(f"manifest {config.manifest}: no usable clip in {counted(manifest.num_rows, 'row')}")
    read = _at_random(manifest.clips, _MAX_COUNTED)
    looked_at = _probe(_at_random(manifest.clips, config.probe), config)
    num_clips = len(manifest.clips) if config.clips is None else config.clips
    groups = _groups(config, read, looked_at, num_clips)
    num_probed = len(looked_at.probed) + looked_at.num_unusable
    notes = [
        f"Captions counted of {len(read):,} of {counted(len(manifest.clips), 'clip')}: {groups[0].num_captions:.2f} a "
        f"clip; {counted(num_probed, 'clip')} probed"
    ]
    if looked_at.num_unusable:
        notes.append(f"{looked_at.num_unusable} of these cannot be used: as large a part of all clips is left out")
    samples = Samples(
        groups=tuple(groups),
        bits=BitsTable(),
        text_channels=config.text_channels,
        max_tokens=config.tokens,
        notes=tuple(notes),
    )
    return samples if config.calibrate is None else calibrate(config, samples, looked_at.probed)


def _at_random(clips: Sequence[Clip], most: int) -> list[Clip]:
    """Returns at most so many of the clips; the same ones each time."""
    if len(clips) <= most:
        return list(clips)
    return [clips[number] for number in random.Random(0).sample(range(len(clips)), most)]


def _probe(clips: Sequence[Clip], config: EstimateConfig) -> ProbedClips:
    probed: list[tuple[Clip, Probe, list[Bucket]]] = []
    reasons: Counter[str] = Counter()
    for clip in clips:
        try:
            facts = probe(clip.media, [clip.time_range])[0]
        except MediaError as error:
            reasons[error.reason] += 1
            continue
        found = buckets_of(
            facts,
            config.parsed_buckets(),
            per_clip=config.buckets_per_clip,
            frame_interval=config.frame_interval,
        )
        if found:
            probed.append((clip, facts, found))
        else:
            reasons["too_short_or_small"] += 1
    if not probed:
        raise InputError(
            f"manifest {config.manifest}: none of {counted(len(clips), 'probed clip')} can be used "
            f"({', '.join(f'{count} {reason}' for reason, count in reasons.most_common())}): look at --buckets"
        )
    return ProbedClips(probed=probed, num_unusable=reasons.total())


def _groups(config: EstimateConfig, read: Sequence[Clip], looked_at: ProbedClips, num_clips: int) -> list[Group]:
    model = config.tokenizer or config.text_encoder
    assert model is not None
    captions = [caption for clip in read for caption in clip.captions]
    tokens = count_tokens(captions, model, max_tokens=config.tokens, cleaning=config.cleaning)
    stored = [(count, len(caption.encode())) for count, caption in zip(tokens, captions, strict=True) if count]
    if not stored:
        raise InputError(f"manifest {config.manifest}: cleaning leaves nothing of any caption: look at --cleaning")
    per_bucket = Counter(bucket for _, _, found in looked_at.probed for bucket in found)
    share = Fraction(num_clips, len(looked_at.probed) + looked_at.num_unusable)
    return [
        Group(
            bucket=bucket,
            num_samples=max(round(count * share), 1),
            num_tokens=sum(count for count, _ in stored) / len(stored),
            num_captions=len(stored) / len(read),
            caption_characters=sum(length for _, length in stored) / len(stored),
            source_characters=round(sum(len(clip.source.encode()) for clip in read) / len(read)),
            manifest_bytes=_column_bytes(read),
        )
        for bucket, count in sorted(per_bucket.items())
    ]


def _column_bytes(clips: Sequence[Clip]) -> int:
    """Returns the bytes of the manifest's other columns as JSON, on average; 0 where there are none."""
    texts = [
        json.dumps(dict(clip.columns), ensure_ascii=False, separators=(",", ":")) for clip in clips if clip.columns
    ]
    return round(sum(len(text.encode()) for text in texts) / len(clips)) if texts else 0
