"""The clips that a cache was made of, found and decoded again as they were encoded."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.dataset import Cache
from shared.cache.fragments import Record, find_files, read_record
from shared.cache.layout import LATENT_STREAM
from shared.cache.snapshot import read_shards
from shared.errors import InputError
from shared.media.clip import Media, TimeRange, Window, centre_window
from shared.media.manifest.tar_headers import TarError, tar_members
from shared.media.probe import probe
from shared.media.refusal import MediaError
from shared.media.sources import open_source
from shared.media.urls import join, locate
from shared.media.video import decode_window
from shared.spec import Bucket


class Originals:
    """Finds the clips of samples. They lie below the folder of the manifest that the job recorded.

    Args:
        cache: What was made of them.
        clips: The folder or URL to look in instead.
    """

    def __init__(self, cache: Cache, clips: str | Path | None) -> None:
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
        try:
            media = _find_media(locate(str(folder)), row["source"])
            return self._decoded(row, media)
        except (MediaError, InputError) as error:
            return f"{error} (--clips names the folder of the clips)"

    def _decoded(self, row: dict[str, Any], media: Media) -> np.ndarray | str:
        start, end = row.get("start"), row.get("end")
        part = None if start is None and end is None else TimeRange(start=start or 0.0, end=end)
        (facts,) = probe(media, [part])
        if facts.version != row["source_version"]:
            return f"{media} has changed since it was encoded"
        bucket = Bucket(row["num_frames"], row["height"], row["width"])
        if row.get("window") is None:
            window = centre_window(facts.num_frames, num_frames=bucket.num_frames, interval=row["frame_interval"])
        else:
            window = Window(
                start=row["window"],
                num_frames=bucket.num_frames,
                interval=row["frame_interval"],
                fps=row.get("sampling_fps"),
                flip=bool(row.get("flip")),
            )
        return decode_window(media, part, window, bucket)


def _find_media(root: str, source: str) -> Media:
    """Returns where a clip lies: a file or an object, or a member of a tar, SHARD.tar/MEMBER.

    Raises:
        MediaError: if its tar cannot be read, or has no such member.
        InputError: if the source can lie nowhere.
    """
    tar, dot_tar, name = source.partition(".tar/")
    if not dot_tar or Path(root, source).is_file():
        return Media(url=join(root, source))
    url = join(root, f"{tar}.tar")
    with open_source(Media(url=url)) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            for member in tar_members(file, size):
                if member.name == name:
                    return Media(url=url, offset=member.offset, size=member.size)
        except TarError as error:
            raise MediaError("truncated_tar", f"{url} {error}") from None
    raise MediaError("missing", f"{url} has no member {name}")


def fragment_id(shard: str) -> str:
    """Returns the identity of a shard, which its fragment has too."""
    return shard.rpartition("/")[2].partition("-")[0]
