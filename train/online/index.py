"""The samples of a manifest that is encoded online: an index like a cache's, and the tasks that decode them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from shared.cache.identity import identity_numbers, identity_texts, latent_id
from shared.clips.plan import SampleTask
from shared.clips.probes import ProbedClip, Probes
from shared.clips.samples import TakenRows
from shared.errors import InputError
from shared.fingerprints import Lookup
from shared.media.clip import Media, TimeRange, Window
from shared.media.manifest import Manifest, parse_mapping, read_manifest
from shared.spec import Bucket
from shared.stores.open import open_store
from train.chosen_rows import Selection
from train.index_columns import Array, IndexFolder, build_once, node_folder
from train.online.encoding import OnlineEncoding
from train.online.index_build import CLIPS_FILE, REFUSED_FILE, build_online_columns
from train.online.probing import probe_clips
from train.run_folder import PROBES_FOLDER
from train.sample_index import RUN_BYTES, IndexedSamples, Variants

if TYPE_CHECKING:  # Loads transformers and diffusers, which a run from a cache does without.
    from train.online.encoders import OnlineEncoders

_LAYOUT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineColumns:
    """The rows (N,) in order. The captions of row i are ``caption_start[i] .. caption_start[i + 1]``."""

    identity: Array
    """(N, 2) uint64: the samples' identities, those that a cache would have."""
    fps: Array
    """(N,) float32, see ``train.index_columns.IndexColumns``."""
    caption_start: Array
    """(N + 1,) int64."""
    num_tokens: Array
    """uint16, of each caption."""
    caption_text: Array
    """int64, of each caption: its text, whose token ids are ``token_start[i] .. token_start[i + 1]``."""
    token_start: Array
    token_ids: Array
    """int32."""
    clip: Array
    """(N,) int64: the row among the clips."""
    start: Array
    """(N,) int32: where the window starts."""
    flip: Array
    """(N,) bool: whether it is mirrored."""
    is_centre: Array
    """(N,) bool: whether it is the one in the middle."""
    num_places: Array
    """(N,) int64: how many places the clip offers, see ``shared.windows``."""

    def tokens(self, caption: int) -> list[int]:
        """Returns the token ids of a caption."""
        text = int(self.caption_text[caption])
        ids: list[int] = self.token_ids[int(self.token_start[text]) : int(self.token_start[text + 1])].tolist()
        return ids


class OnlineIndex(IndexedSamples):
    """The samples of a manifest. Build it with :meth:`open`."""

    def __init__(self, encoding: OnlineEncoding, encoders: "OnlineEncoders", folder: IndexFolder) -> None:
        super().__init__(encoding.manifest, encoders.provenance(), folder)
        self.encoding, self.encoders = encoding, encoders
        self.refused: dict[str, int] = folder.about()["refused"]
        """Clips and rows of the manifest that are not used, by reason."""
        self._clips = TakenRows(pa.ipc.open_file(pa.memory_map(str(folder.path / CLIPS_FILE))).read_all())
        self.columns = OnlineColumns(
            **{name: np.load(folder.path / f"{name}.npy", mmap_mode="r") for name in OnlineColumns.__dataclass_fields__}
        )

    @classmethod
    def open(
        cls,
        encoding: OnlineEncoding,
        encoders: "OnlineEncoders",
        manifest: Manifest,
        probes: Probes,
        selection: Selection,
        *,
        variants: Variants = "one",
        local_cache: Path | None = None,
        run_bytes: int = RUN_BYTES,
    ) -> "OnlineIndex":
        """Returns the index; the first process of a node to ask builds it.

        Args:
            encoding: What is encoded.
            encoders: By what.
            manifest: As ``encoding`` names it.
            probes: Of its clips; those that are not probed are left out.
            selection: Which samples are used.
            variants: What an epoch takes of a clip that has several windows, or mirrored ones.
            local_cache: A folder of this node; the system's temporary one by default.
            run_bytes: See ``train.sample_index``.

        Raises:
            InputError: if there is no sample, or the options do not suit the encoders.
        """
        table = probes.table_for(manifest)
        provenance = encoders.provenance()
        made_from = {
            "online": _LAYOUT_VERSION,
            "manifest": _sha256(manifest.table),
            "probes": _sha256(table),
            "encoding": {**asdict(encoding), **_DECIDE_NOTHING},
            "provenance": provenance,
            "selection": asdict(selection),
            "variants": variants,
            "run_bytes": run_bytes,
        }

        def build(folder: Path) -> dict[str, Any]:
            built = build_online_columns(
                folder,
                manifest,
                table,
                encoding,
                provenance,
                encoders.text,
                selection,
                by_clip=variants == "one",
            )
            return {**built, "run_bytes": run_bytes}

        return cls(encoding, encoders, build_once(node_folder(local_cache), made_from, build))

    def refusals(self) -> str:
        """Returns why clips and rows of the manifest are not used, as lines of JSON."""
        return (self.folder.path / REFUSED_FILE).read_text()

    def sources(self, samples: Sequence[str]) -> dict[str, str]:
        """Returns the sources of samples by identity."""
        rows = Lookup(np.asarray(self.columns.identity)).find(identity_numbers(samples))
        clips = [self._clips.take(self.columns.clip[[row]], ["source"])["source"][0].as_py() for row in rows[rows >= 0]]
        return dict(zip((sample for sample, row in zip(samples, rows, strict=True) if row >= 0), clips, strict=True))

    def task(self, bucket: Bucket, row: int, start: int | None = None) -> SampleTask:
        """Returns what decodes a sample.

        Args:
            bucket: The row's.
            row: Of the index.
            start: Where its window starts, if not where it was planned.
        """
        columns, sampling = self.columns, self.encoding.sampling
        clip = self._clips.take(np.array([int(columns.clip[row])])).to_pylist()[0]
        is_whole = clip["start"] is None and clip["end"] is None
        time_range = None if is_whole else TimeRange(start=clip["start"] or 0.0, end=clip["end"])
        task = SampleTask(
            sample=identity_texts(np.array(columns.identity[row : row + 1]))[0],
            source=clip["source"],
            source_version=clip["version"],
            media=Media(url=clip["url"], offset=clip["offset"], size=clip["size"]),
            time_range=time_range,
            captions=(),
            window=Window(
                start=int(columns.start[row]),
                num_frames=bucket.num_frames,
                interval=sampling.interval,
                fps=sampling.fps,
                flip=bool(columns.flip[row]),
            ),
            is_centre=bool(columns.is_centre[row]),
            fps=float(columns.fps[row]),
        )
        if start is None or start == task.window.start:
            return task
        moved = replace(task, window=replace(task.window, start=start), is_centre=False)
        identity = latent_id(
            source=moved.source,
            source_version=moved.source_version,
            bucket=bucket,
            frame_interval=sampling.interval,
            time_range=time_range,
            fps=sampling.fps,
            window=start,
            flip=moved.window.flip,
        )
        return replace(moved, sample=identity)


_DECIDE_NOTHING = dict.fromkeys(
    ("online", "probes", "decode_timeout", "decode_ahead_mb", "faster_t5", "faster_vae", "online_windows")
)
"""Of the encoding's options, those on which the index does not depend."""


def read_clips(encoding: OnlineEncoding) -> Manifest:
    """Returns the manifest of an encoding.

    Raises:
        InputError: if it cannot be read, or names no clip.
    """
    manifest = read_manifest(encoding.manifest, columns=parse_mapping(encoding.columns), ignore=encoding.ignore_columns)
    manifest.require_usable(encoding.manifest)
    if not manifest.table.num_rows:
        raise InputError(f"manifest {encoding.manifest}: it names no clip")
    return manifest


def open_probes(encoding: OnlineEncoding, output: Path) -> Probes:
    """Returns where the probes of a run's clips are kept."""
    return Probes.open(open_store(encoding.probes or str(output / PROBES_FOLDER)))


def probe_manifest(encoding: OnlineEncoding, output: Path, *, num_workers: int) -> list[ProbedClip]:
    """Probes what is not probed of a manifest; one process of a run does it. Returns clips that could not be looked at.

    Raises:
        InputError: as :func:`read_clips`, and if probes cannot be kept.
    """
    return probe_clips(
        read_clips(encoding),
        open_probes(encoding, output),
        num_workers=num_workers,
        timeout_seconds=encoding.decode_timeout,
    )


def _sha256(table: pa.Table) -> str:
    digest = hashlib.sha256(json.dumps(table.schema.names).encode())
    for batch in table.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()
