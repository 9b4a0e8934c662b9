"""Mending a cache after a check: what is broken is dropped, so that the next job makes it anew.

Nothing that is sound is deleted. Files of the index that cannot be used are moved to ``broken/``, where no reader
looks. A broken shard stays where it is until it is swept: its samples are removed by a row of the index, and encoded
again they get a shard of another name. A sample whose latent is sound and whose texts are not keeps the latent: a row
that gives it no texts makes the next job encode them. Where a stream's description is lost nothing is touched: what it
described looks broken and is not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow.compute as pc

from shared.cache import layout
from shared.cache.commit import commit_rows
from shared.cache.dataset import Cache
from shared.cache.finding import Finding
from shared.cache.fragments import SHARED_KIND, read_record, scan_fragment
from shared.cache.identity import shard_id
from shared.cache.removal import remove_samples
from shared.cache.repair_snapshot import mend_snapshot
from shared.cache.rows import Row
from shared.cache.schema import FORMAT_VERSION, SHARED, rows_table
from shared.errors import InputError
from shared.wording import counted

BROKEN_FOLDER = "broken"
_PART = re.compile(rf"{layout.SNAPSHOT_FOLDER}/[^/]+/")
_SHARD = re.compile(rf"{layout.SHARD_FOLDER}/text\.[^/]+/")
_LEFTOVER_AGE = timedelta(days=1)


def repair(cache: Cache, faults: Iterable[Finding]) -> Iterator[str]:
    """Mends what a check found and yields one line for each thing done. Run again, it does nothing more.

    Args:
        cache: That was checked.
        faults: All that were found.

    Raises:
        InputError: if the cache cannot be written, is of an older format, or lacks the description of a stream.
    """
    faults = list(faults)
    if faults and cache.version != FORMAT_VERSION:
        raise InputError(f"{cache.url}: its format version {cache.version} is read only: make it anew, or convert it")
    for finding in faults:
        if finding.path == layout.DATASET_FILE or finding.path.startswith(f"{layout.STREAM_FOLDER}/"):
            raise _not_described(cache, finding.path)
    aside = dict.fromkeys(finding.path for finding in faults if finding.remedy == "set aside")
    broken = {finding.path for finding in faults if finding.remedy == "encode again"}
    for path in aside:
        for stream in sorted(_text_streams(cache, path) - cache.provenance.keys()):
            raise _not_described(cache, f"{layout.STREAM_FOLDER}/{stream}.json")
    parts = [path for path in aside if _PART.match(path)]
    if parts and (done := mend_snapshot(cache.store, cache.index_files(), broken_parts=parts, broken_shards=())):
        yield done
    for path in aside:
        yield _set_aside(cache, path)
    if broken:
        yield from _drop_shards(cache, broken)
    deadline = datetime.now(UTC) - _LEFTOVER_AGE
    for entry in list(cache.store.leftovers()):
        if entry.modified < deadline:
            cache.store.delete(entry.path)
            yield f"{entry.path}: deleted, a leftover of more than a day"


def _not_described(cache: Cache, path: str) -> InputError:
    return InputError(f"{cache.url}: without a sound {path} nothing is repaired: bring it back first")


def _text_streams(cache: Cache, path: str) -> set[str]:
    """Returns the streams of texts that a file of the index brings, as far as it can be read."""
    if not path.startswith(f"{layout.INDEX_FOLDER}/") and not _PART.match(path):
        return set()
    try:
        fragment = scan_fragment(cache.store, path, ["sample", f"{SHARED}.shard"])
    except (FileNotFoundError, InputError):
        return set()
    streams = {name for name in fragment.schema.names if layout.is_text(name)}
    if fragment.is_shared and SHARED in fragment.table.column_names:
        shards = pc.struct_field(fragment.table[SHARED].combine_chunks(), "shard").unique().to_pylist()
        streams.update(shard.split("/")[1] for shard in shards if _SHARD.match(shard or ""))
    return streams


def _set_aside(cache: Cache, path: str) -> str:
    place = f"{BROKEN_FOLDER}/{path}"
    try:
        content = cache.store.read(path)
    except FileNotFoundError:
        return f"{path}: gone; the next job makes anew what it named"
    cache.store.write(place, content)
    cache.store.delete(path)
    return f"{path}: moved to {place}; the next job makes it anew"


def _drop_shards(cache: Cache, broken: set[str]) -> Iterator[str]:
    """Takes broken shards out of the index."""
    files = cache.index_files()
    for path in (*files.fragments, *files.covered):
        if path.startswith(f"{layout.INDEX_FOLDER}/"):
            record = read_record(cache.store, path)
            if record.get("kind") == SHARED_KIND and record.get("shard") in broken:
                yield _set_aside(cache, path)
    texts = [stream for stream in cache.provenance if layout.is_text(stream)]
    columns = ["latent.shard"]
    for stream in texts:
        columns += [f"{stream}.channels", f"{stream}.captions.list.element.shard"]
    whole: dict[str, str] = {}
    lacking: dict[str, dict[str, Mapping[str, Any]]] = {stream: {} for stream in texts}
    for row in cache.read_index(columns=columns).to_pylist():
        if row[layout.LATENT_STREAM]["shard"] in broken:
            whole[row["sample"]] = row[layout.LATENT_STREAM]["shard"]
            continue
        for stream in texts:
            text = row.get(stream)
            if text and broken & {caption["shard"] for caption in text["captions"]}:
                lacking[stream][row["sample"]] = text
    remove_samples(cache, whole)
    for shard in sorted(broken):
        count = sum(place == shard for place in whole.values())
        what = (
            f"{counted(count, 'sample')} removed, to be encoded again by the next job"
            if count
            else "dropped; it holds texts alone"
        )
        yield f"{shard}: {what}"
    for stream, samples in lacking.items():
        if samples:
            _take_texts(cache, stream, samples)
            left = counted(len(samples), "sample")
            yield f"{stream}: {left} left with latents and without these texts; the next job encodes them"
    if done := mend_snapshot(cache.store, cache.index_files(), broken_parts=(), broken_shards=broken):
        yield done


def _take_texts(cache: Cache, stream: str, samples: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives samples no texts in a stream, at one generation more than they had."""
    rows: list[Row] = []
    members = []
    for sample, text in samples.items():
        generation = text["generation"] + 1
        rows.append({"sample": sample, stream: {**text, "generation": generation, "captions": []}})
        members.append(f"{sample}@{generation}")
    commit_rows(
        cache.store, shard_id(members, streams=[stream, "removed"]), rows_table(rows), {"kind": "texts removed"}
    )
