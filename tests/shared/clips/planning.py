"""Manifests and probes for tests of planning, made of a few words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import torch

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache, Provenance
from shared.cache.identity import text_id
from shared.cache.rows import Sample, Text, sample_row
from shared.clips.plan import ShardTask
from shared.clips.probes import ProbedClip, Probes
from shared.codec import Codec
from shared.media.clip import Clip, Media, TimeRange, Value
from shared.media.manifest import Manifest, RefusedRow
from shared.media.probe import Probe
from shared.stores.local import LocalStore

_COLUMNS = pa.schema(
    [
        ("source", pa.string()),
        ("url", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("captions", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipOfTest:
    """A row of a manifest, and what probing says of it; nothing, if ``facts`` is None."""

    clip: Clip
    facts: Probe | None
    reason: str | None = None


def clip(
    name: str,
    *,
    num_frames: int = 30,
    height: int = 360,
    width: int = 640,
    version: str = "1",
    fps: Fraction = Fraction(24),
    duration: float | None = None,
    is_image: bool = False,
    captions: tuple[str, ...] = ("a caption",),
    time_range: TimeRange | None = None,
    columns: dict[str, Value] | None = None,
    reason: str | None = None,
) -> ClipOfTest:
    """Returns a clip and its facts; with a reason, one that cannot be used."""
    facts = Probe(
        version=version,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=fps,
        duration=num_frames / float(fps) if duration is None else duration,
        rotation=0,
        is_image=is_image,
        codec="h264",
    )
    made = Clip(
        source=name,
        media=Media(url=f"/folder/{name}"),
        captions=captions,
        time_range=time_range,
        columns=columns or {},
    )
    return ClipOfTest(clip=made, facts=None if reason else facts, reason=reason)


def manifest_of(clips: Iterable[Clip], refused: Sequence[str] = ()) -> Manifest:
    """Returns a manifest of these clips, with rows of these sources that are refused."""
    rows = [
        {
            "source": made.source,
            "url": made.media.url,
            "offset": made.media.offset,
            "size": made.media.size,
            "start": made.time_range and made.time_range.start,
            "end": made.time_range and made.time_range.end,
            "captions": list(made.captions),
            **({"columns": dict(made.columns)} if made.columns else {}),
        }
        for made in clips
    ]
    table = pa.Table.from_pylist(rows, schema=_COLUMNS)
    if columns := [row["columns"] for row in rows if "columns" in row]:
        table = table.append_column("columns", pa.array(columns))
    return Manifest(
        root="/folder",
        num_rows=len(rows) + len(refused),
        table=table,
        refused=[RefusedRow(source=source, reason="no_caption", detail="") for source in refused],
    )


def probed(made: ClipOfTest) -> list[ProbedClip]:
    """Returns what probing found of a clip."""
    found = ProbedClip(
        source=made.clip.source,
        media=made.clip.media,
        time_range=made.clip.time_range,
        stamp="1",
        facts=made.facts,
        reason=made.reason,
        detail=made.reason and "because",
    )
    return [found]


def probes_of(folder: Path, manifest: Manifest, clips: Iterable[ClipOfTest]) -> pa.Table:
    """Returns the probes of a manifest's clips, by way of a store."""
    probes = Probes.open(LocalStore(folder))
    probes.add(row for made in clips for row in probed(made))
    return probes.table_for(manifest)


def add_committed(cache: Cache, tasks: Sequence[ShardTask]) -> None:
    """Commits planned samples to a cache, with small latents and texts, as encoding would."""
    codecs = {"latent": Codec.parse("bfloat16"), "text.t5": Codec.parse("bfloat16")}
    for task in tasks:
        with ShardWriter(
            cache.store,
            shard_id=task.shard_id,
            folder=str(task.bucket),
            container="tar",
            record={"kind": "samples"},
        ) as writer:
            for sample in task.samples:
                made = Sample(
                    sample=sample.sample,
                    source=sample.source,
                    source_version=sample.source_version,
                    bucket=task.bucket,
                    frame_interval=sample.window.interval,
                    fps=sample.fps,
                    latent=torch.ones(4, 1, 2, 2),
                    texts={
                        "text.t5": tuple(
                            Text(id=text_id(caption), caption=caption, embedding=torch.ones(1, 8))
                            for caption in sample.captions
                        )
                    },
                    time_range=sample.time_range,
                    sampling_fps=sample.window.fps,
                    window=sample.stored_window,
                    flip=sample.window.flip,
                )
                writer.add(*sample_row(made, codecs, task.generation))
            writer.commit()


PROVENANCE: Provenance = {
    "latent": {"latent_channels": 4, "spatial_stride": 8, "temporal_stride": 1, "codec": "bfloat16"},
    "text.t5": {"text_channels": 8, "max_tokens": 120, "codec": "bfloat16"},
}
