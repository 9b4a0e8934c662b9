"""A folder of clips, at any depth, each with its caption in a .txt beside it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from shared.media.clip import Media
from shared.media.manifest.json_lines import is_text
from shared.media.manifest.names import Roles
from shared.media.manifest.rows import BATCH_ROWS, Batch, Refusals
from shared.media.refusal import MediaError
from shared.media.remote import list_objects
from shared.media.sources import open_source
from shared.media.urls import scheme_of

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_MAX_CAPTION_BYTES = 1024 * 1024
_NUM_READERS = 16


def is_folder(url: str, *, known_file: bool) -> bool:
    """Returns whether a manifest is a folder: it is one, or a URL without a known file's ending."""
    return os.path.isdir(url) if scheme_of(url) is None else not known_file


def read_folder(url: str, shown: str, roles: Roles, refusals: Refusals) -> Iterator[Batch]:
    """Yields a row a clip, sorted by path; sources are relative to the folder.

    Args:
        url: A folder, or a prefix of an object store.
        shown: What to call it in messages.
        roles: What our columns are called.
        refusals: Gets the clips whose name or caption is no UTF-8, or whose caption cannot be read.

    Raises:
        InputError: if columns are to be mapped or ignored: it has none but path and text.
        MediaError: if it cannot be listed, or there is not one clip in it.
    """
    roles.check(shown, ["path", "text"])
    names = sorted(_walk(url) if scheme_of(url) is None else _listed(url))
    captions = {name for name in names if name.lower().endswith(".txt")}
    clips = [name for name in names if name.lower().endswith(VIDEO_ENDINGS + IMAGE_ENDINGS)]
    if not clips:
        endings = ", ".join(VIDEO_ENDINGS + IMAGE_ENDINGS)
        raise MediaError("empty", f"{url} has no clips: expected files {endings} with a .txt beside each")
    row = 0
    remaining = iter(clips)
    with ThreadPoolExecutor(_NUM_READERS if scheme_of(url) else 1) as pool:
        while some := list(islice(remaining, BATCH_ROWS)):
            beside = [f"{os.path.splitext(name)[0]}.txt" for name in some]
            paths = [f"{url.rstrip('/')}/{name}" if name in captions else None for name in beside]
            texts = list(pool.map(_caption, paths))
            good: list[int] = []
            for number, (name, text) in enumerate(zip(some, texts, strict=True)):
                if isinstance(text, MediaError):
                    refusals.add(name, text.reason, text.detail)
                elif not is_text(name):
                    refusals.add(name, "bad_path", f"{name!r} is no UTF-8")
                else:
                    good.append(number)
            yield Batch(
                numbers=np.array(good, np.int64) + row + 1,
                columns={
                    roles.path: pa.array([some[number] for number in good], pa.large_string()),
                    roles.texts[0]: pa.array([texts[number] for number in good], pa.large_string()),
                },
            )
            row += len(some)


def _walk(folder: str) -> Iterator[str]:
    """Yields the relative paths of all files; a folder that is reached twice, by links, is walked once."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        facts = os.stat(parent)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders.sort()
        relative = os.path.relpath(parent, folder)
        yield from (name if relative == "." else f"{relative}/{name}" for name in files)


def _listed(url: str) -> Iterator[str]:
    start = f"{url.rstrip('/')}/"
    yield from (found.removeprefix(start) for found, _ in list_objects(url) if found.startswith(start))


def _caption(url: str | None) -> str | MediaError | None:
    if url is None:
        return None
    try:
        with open_source(Media(url=url)) as file:
            return file.read(_MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
    except MediaError as error:
        return error
    except UnicodeDecodeError:
        return MediaError("bad_text", f"{PurePosixPath(url).name} is no UTF-8")
    except OSError as error:
        return MediaError("not_readable", f"{url}: {error.strerror}")
