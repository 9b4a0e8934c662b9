"""WebDataset shards: a clip, its text and its JSON are members of a tar that share a name but for its ending.

A clip's source is SHARD.tar/MEMBER. The tars stay as they are: clips are read where they lie in them.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from tempfile import TemporaryFile
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from shared.errors import InputError
from shared.media.clip import Media
from shared.media.manifest.folder import IMAGE_ENDINGS, VIDEO_ENDINGS
from shared.media.manifest.json_lines import MAX_COLUMNS, as_text, is_text, parse_object
from shared.media.manifest.names import OURS, Roles
from shared.media.manifest.rows import Batch, Places, Refusals
from shared.media.manifest.tar_headers import Member, TarError, tar_members
from shared.media.ranged_file import RangedFile
from shared.media.refusal import MediaError
from shared.media.remote import NoRangeError, remote
from shared.media.sources import open_source
from shared.media.urls import scheme_of

_CAPTION_KEYS = ("caption", "text")
_MAX_TEXT_BYTES = 1024 * 1024
_HEADER_BLOCK_BYTES = 64 * 1024
"""Read at once of a tar on an object store: a header, and the text and JSON beside it."""
_NUM_READERS = 16
_SHARDS_AT_ONCE = 64


@dataclass(kw_only=True, slots=True)
class _Shard:
    """What the headers of one tar say."""

    url: str
    source: str
    clips: list[Member] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """By the members' common name."""
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Common names whose text or JSON cannot be used: reason and detail."""
    refused: list[tuple[str, str, str]] = field(default_factory=list)


def read_shards(urls: list[str], shown: str, root: str, roles: Roles, refusals: Refusals) -> Iterator[Batch]:
    """Yields a row a clip of each shard, in order.

    Args:
        urls: The shards.
        shown: What to call them in messages.
        root: What their sources are relative to.
        roles: What the keys of the JSON are called that are to be ours.
        refusals: Gets the clips and tars that cannot be used.

    Raises:
        InputError: if a mapped or ignored key is nowhere.
        MediaError: if a shard cannot be read.
    """
    if roles.path in roles.mapped:
        raise InputError(f"--columns {roles.path}=path: the clips of shards are their members: drop it")
    names: dict[str, None] = {}
    num_rows = 0
    remaining = iter(urls)
    with ThreadPoolExecutor(_NUM_READERS if scheme_of(root) else 1) as pool:
        while some := list(islice(remaining, _SHARDS_AT_ONCE)):
            for shard in pool.map(lambda url: _scan(url, url.removeprefix(root).lstrip("/")), some):
                batch = _batch(shard, roles, names, num_rows, refusals)
                num_rows += len(batch.numbers) + len(shard.refused)
                yield batch
    roles.check(shown, ["path", *dict.fromkeys(("text", *names))])


def _scan(url: str, source: str) -> _Shard:
    shard = _Shard(url=url, source=source)
    seen: set[str] = set()
    with _opened(url) as (file, num_bytes):
        try:
            for member in tar_members(file, num_bytes):
                stem, dot, ending = member.name.rpartition(".")
                ending = f".{ending.lower()}"
                if not dot or ending not in (*VIDEO_ENDINGS, *IMAGE_ENDINGS, ".txt", ".json"):
                    continue
                if not is_text(member.name):
                    shard.refused.append((f"{source}/{member.name}", "bad_path", "its name is no UTF-8"))
                elif member.name in seen:
                    shard.refused.append((f"{source}/{member.name}", "duplicate_member", "another has this name"))
                elif member.is_sparse:
                    shard.refused.append((f"{source}/{member.name}", "sparse_member", "expected a plain file"))
                elif ending in (".txt", ".json"):
                    _take_text(shard, file, member, stem, ending)
                else:
                    shard.clips.append(member)
                seen.add(member.name)
        except TarError as error:
            shard.refused.append((source, "truncated_tar", f"the tar {error}"))
    return shard


def _take_text(shard: _Shard, file: BinaryIO, member: Member, stem: str, ending: str) -> None:
    if member.size > _MAX_TEXT_BYTES:
        shard.bad[stem] = "caption_too_long", f"{member.name}: {member.size} bytes: expected at most {_MAX_TEXT_BYTES}"
        return
    file.seek(member.offset)
    try:
        text = file.read(member.size).decode("utf-8-sig")
        if ending == ".txt":
            shard.texts[stem] = text.strip()
        else:
            shard.objects[stem] = parse_object(text)
    except UnicodeDecodeError:
        shard.bad[stem] = "bad_text", f"{member.name} is no UTF-8"
    except ValueError as error:
        shard.bad[stem] = "bad_json", f"{member.name}: {error}"


@contextmanager
def _opened(url: str) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a tar for reading headers: a file and its size."""
    if scheme_of(url) is None:
        with open_source(Media(url=url)) as file:
            yield file, file.seek(0, os.SEEK_END)
        return
    found = remote(url)
    num_bytes = found.facts().size
    try:
        if num_bytes:
            found.read(0, 1)
        ranged = RangedFile(found.read, offset=0, size=num_bytes, block_bytes=_HEADER_BLOCK_BYTES, blocks_ahead=1)
        with io.BufferedReader(ranged) as buffered:
            yield cast(BinaryIO, buffered), num_bytes
    except NoRangeError:
        with TemporaryFile() as file:
            found.fetch(file)
            yield file, file.seek(0, os.SEEK_END)


def _batch(shard: _Shard, roles: Roles, names: dict[str, None], num_before: int, refusals: Refusals) -> Batch:
    """Returns a shard's rows; ``names`` gets the keys of its JSON."""
    videos = {_stem(member) for member in shard.clips if not _is_image(member)}
    rows: list[tuple[Member, dict[str, str | None]]] = []
    for member in shard.clips:
        stem = _stem(member)
        if _is_image(member) and stem in videos:  # A picture of the video.
            continue
        source = f"{shard.source}/{member.name}"
        if stem in shard.bad:
            shard.refused.append((source, *shard.bad[stem]))
            continue
        row = _row(shard.texts.get(stem), shard.objects.get(stem, {}), roles)
        if not all(is_text(name) and is_text(text) for name, text in row.items()):
            shard.refused.append((source, "bad_text", "half a surrogate pair"))
            continue
        names.update(dict.fromkeys(row))
        rows.append((member, {**row, roles.path: source}))
    if len(names) > MAX_COLUMNS:
        raise MediaError("not_readable", f"{shard.url}: more than {MAX_COLUMNS} keys: expected the same for all clips")
    for refusal in shard.refused:
        refusals.add(*refusal)
    members = [member for member, _ in rows]
    return Batch(
        numbers=np.arange(len(rows)) + num_before + 1,
        columns={
            name: pa.array([row.get(name) for _, row in rows], pa.large_string())
            for name in dict.fromkeys((roles.path, *roles.texts, *names))
        },
        places=Places(
            urls=pa.array([shard.url] * len(rows), pa.large_string()),
            offsets=pa.array([member.offset for member in members], pa.int64()),
            sizes=pa.array([member.size for member in members], pa.int64()),
        ),
    )


def _row(text: str | None, found: dict[str, Any], roles: Roles) -> dict[str, str | None]:
    """Returns a clip's columns: its caption, and what the JSON says in plain values or as one of ours."""
    left_out = {*OURS, *_CAPTION_KEYS} - {*roles.mapped}
    row = {
        name: as_text(value)
        for name, value in found.items()
        if name not in left_out and roles.is_read(name) and (name in roles.mapped or not isinstance(value, list | dict))
    }
    if not {*roles.texts} & {*roles.mapped}:
        said = [value for key in _CAPTION_KEYS if isinstance(value := found.get(key), str)]
        row["text"] = text or (said[0] if said else None)
    return row


def _stem(member: Member) -> str:
    return member.name.rpartition(".")[0]


def _is_image(member: Member) -> bool:
    return member.name.lower().endswith(IMAGE_ENDINGS)
