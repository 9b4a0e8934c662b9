"""The clips that a cache was made of, found and decoded again as they were encoded."""

from pathlib import Path
from typing import Any

import numpy as np

from preprocess.decode import decode_sample
from preprocess.plan import SampleTask
from shared.cache.dataset import Cache
from shared.cache.fragments import Record, find_files, read_record
from shared.cache.layout import LATENT_STREAM
from shared.cache.ledger import Refusal
from shared.cache.snapshot import read_shards
from shared.errors import InputError
from shared.media.probe import probe
from shared.media.video import MediaError, centre_window
from shared.spec import Bucket


class Originals:
    """Finds the clips of samples. They lie below the folder of the manifest that the job recorded.

    Args:
        cache: What was made of them.
        clips: The folder to look in instead.
    """

    def __init__(self, cache: Cache, clips: Path | None) -> None:
        self._store, self._clips = cache.store, clips
        self._records: dict[str, Record] = {}
        self._snapshot: dict[str, Record] | None = None

    def record(self, shard: str) -> Record:
        """Returns what was recorded with a shard, nothing if neither a fragment nor the snapshot knows it."""
        if shard not in self._records:
            try:
                self._records[shard] = read_record(self._store, fragment_id(shard))
            except (InputError, FileNotFoundError):
                self._records[shard] = self._from_snapshot().get(shard, {})
        return self._records[shard]

    def _from_snapshot(self) -> dict[str, Record]:
        if self._snapshot is None:
            path = find_files(self._store).snapshot
            shards = read_shards(self._store, path) if path else []
            self._snapshot = {shard.shard: shard.fragment_record() for shard in shards}
        return self._snapshot

    def frames(self, row: dict[str, Any]) -> np.ndarray | str:
        """Returns the frames (T, height, width, 3) uint8 that were encoded, or why they cannot be had."""
        folder = self._clips or self.record(row[LATENT_STREAM]["shard"]).get("clips_root")
        if folder is None:
            return "the folder of its clips is not recorded any more (--clips names it)"
        path = Path(folder) / row["source"]
        try:
            facts = probe(path)
        except MediaError as error:
            return f"{error} (--clips names the folder of the clips)"
        if facts.version != row["source_version"]:
            return f"{path} has changed since it was encoded"
        bucket = Bucket(row["num_frames"], row["height"], row["width"])
        task = SampleTask(
            sample=row["sample"],
            source=row["source"],
            source_version=facts.version,
            path=path,
            captions=(),
            window=centre_window(facts.num_frames, num_frames=bucket.num_frames, interval=row["frame_interval"]),
            fps=row["fps"],
        )
        frames = decode_sample(task, bucket)
        return frames.detail if isinstance(frames, Refusal) else frames


def fragment_id(shard: str) -> str:
    """Returns the identity of a shard, which its fragment has too."""
    return shard.rpartition("/")[2].partition("-")[0]
