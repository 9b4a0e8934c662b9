"""From a batch of rows to those that name a clip and say something of it, and why the rest do not."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import InputError
from shared.media.manifest.names import Roles
from shared.media.manifest.ranges import check_range, parse_seconds
from shared.media.manifest.rows import Batch, Refusals, Times
from shared.media.manifest.values import is_numeric, texts
from shared.media.urls import UNTIDY, join, scheme_of

MAX_CHARACTERS = 5_000
"""Of a caption: far more than any token limit keeps, and little enough to be cleaned in a moment."""
_TIDY_URL = r"^(s3|gs|az|hf|http|https)://"
_ANY_URL = r"^[A-Za-z][A-Za-z0-9+.\-]*://"

Columns = dict[str, pa.Array]


def checked_rows(batch: Batch, roles: Roles, root: str, refusals: Refusals) -> tuple[Columns, Columns]:
    """Returns the rows that can be used.

    Returns:
        Our columns: source, url (large_string), offset, size (int64), start, end (float64), captions
        (list<large_string>); and the others as they came.
    """
    sources = texts(batch.columns[roles.path])
    captions = [texts(batch.columns[name]) for name in roles.texts]
    kept = _with_sources_and_captions(batch, sources, captions, refusals)
    starts, ends, good = _times(batch, roles, sources, kept, refusals)
    kept = pc.and_(kept, good)
    urls, good = _urls(batch, root, sources, kept, refusals)
    kept = pc.and_(kept, good)
    ours = {
        "source": sources,
        "url": urls,
        "offset": batch.places.offsets if batch.places else pa.nulls(len(sources), pa.int64()),
        "size": batch.places.sizes if batch.places else pa.nulls(len(sources), pa.int64()),
        "start": starts,
        "end": ends,
        "captions": _lists([pc.if_else(_usable(texts), texts, pa.scalar(None, texts.type)) for texts in captions]),
    }
    others = {name: batch.columns[name] for name in roles.others(list(batch.columns))}
    return tuple({name: array.filter(kept) for name, array in part.items()} for part in (ours, others))  # type: ignore[return-value]


def _said(texts: pa.Array) -> pa.Array:
    """Returns which texts say something."""
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(texts), ""), False)


def _usable(texts: pa.Array) -> pa.Array:
    return pc.and_(_said(texts), pc.fill_null(pc.less_equal(pc.utf8_length(texts), MAX_CHARACTERS), False))


def _with_sources_and_captions(
    batch: Batch, sources: pa.Array, captions: list[pa.Array], refusals: Refusals
) -> pa.Array:
    named = _said(sources)
    said = _any([_said(texts) for texts in captions])
    usable = _any([_usable(texts) for texts in captions])
    too_long = _any([pc.greater(pc.fill_null(pc.utf8_length(texts), 0), MAX_CHARACTERS) for texts in captions])
    sound = pc.invert(pc.match_substring(pc.fill_null(sources, ""), "\x00"))
    kept = pc.and_(pc.and_(named, usable), sound)
    for row in pc.indices_nonzero(pc.or_(pc.invert(kept), too_long)).to_pylist():
        number, source = batch.numbers[row], sources[row].as_py()
        lengths = [len(texts[row].as_py() or "") for texts in captions]
        if not named[row].as_py():
            refusal = (f"row {number}", "no_path", "the row names no clip")
        elif not said[row].as_py():
            refusal = (source, "no_caption", f"row {number} has no text")
        elif too_long[row].as_py():
            detail = f"row {number}: {max(lengths)} characters: expected at most {MAX_CHARACTERS}"
            refusal = (source, "caption_too_long", detail)
        else:
            refusal = (repr(source), "bad_path", f"row {number}: the path has a NUL byte")
        refusals.add(*refusal)
    return kept


def _any(masks: list[pa.Array]) -> pa.Array:
    found = masks[0]
    for mask in masks[1:]:
        found = pc.or_(found, mask)
    return found


def _lists(columns: list[pa.Array]) -> pa.Array:
    """Returns the columns' texts of each row, without nulls: list<large_string>."""
    kind = pa.list_(pa.large_string())
    if len(columns) == 1:
        ends = np.cumsum(pc.is_valid(columns[0]).to_numpy(zero_copy_only=False), dtype=np.int32)
        offsets = np.concatenate([np.zeros(1, np.int32), ends])
        return pa.ListArray.from_arrays(pa.array(offsets), columns[0].drop_null(), type=kind)
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array([list(dict.fromkeys(text for text in row if text is not None)) for row in rows], kind)


def _times(
    batch: Batch, roles: Roles, sources: pa.Array, kept: pa.Array, refusals: Refusals
) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Returns starts, ends, and which rows have good ones."""
    nothing = pa.nulls(len(sources), pa.float64())
    everything = pa.array([True] * len(sources), pa.bool_())
    times = batch.times
    if times is not None:
        return times.starts, times.ends, everything
    if roles.start not in batch.columns and roles.end not in batch.columns:
        return nothing, nothing, everything
    raw = [batch.columns.get(name, nothing) for name in (roles.start, roles.end)]
    if all(is_numeric(array.type) for array in raw):
        found = _numeric_times(*(array.cast(pa.float64()) for array in raw))
        if found is not None:
            return found.starts, found.ends, everything
    pairs: list[tuple[float | None, float | None]] = []
    good: list[bool] = []
    for row, (start, end, is_kept) in enumerate(zip(*(array.to_pylist() for array in (*raw, kept)), strict=True)):
        try:
            pairs.append(check_range(parse_seconds(start), parse_seconds(end)))
            good.append(True)
        except ValueError as error:
            pairs.append((None, None))
            good.append(False)
            if is_kept:
                refusals.add(sources[row].as_py(), "bad_range", f"row {batch.numbers[row]}: {error}")
    starts, ends = (pa.array(values, pa.float64()) for values in zip(*pairs, strict=True))
    return starts, ends, pa.array(good, pa.bool_())


def _numeric_times(starts: pa.Array, ends: pa.Array) -> Times | None:
    """Returns the same as :func:`check_range` of each pair, or None if one of them is bad."""
    begins = pc.fill_null(starts, 0.0)
    good = pc.and_(pc.and_(pc.is_finite(begins), pc.greater_equal(begins, 0.0)), pc.fill_null(pc.is_finite(ends), True))
    good = pc.and_(good, pc.fill_null(pc.greater(ends, begins), True))
    if not pc.all(good, min_count=0).as_py():
        return None
    is_whole = pc.and_(pc.equal(begins, 0.0), pc.is_null(ends))
    return Times(starts=pc.if_else(is_whole, pa.scalar(None, pa.float64()), pc.abs(begins)), ends=ends)


def _urls(batch: Batch, root: str, sources: pa.Array, kept: pa.Array, refusals: Refusals) -> tuple[pa.Array, pa.Array]:
    """Returns where the sources lie, and which of them can lie anywhere."""
    if batch.places is not None:
        return batch.places.urls, pa.array([True] * len(sources), pa.bool_())
    sources = pc.fill_null(sources, "")
    is_url = pc.match_substring_regex(sources, _ANY_URL)
    is_absolute = pc.starts_with(sources, "/")
    joined = pc.binary_join_element_wise(
        pa.scalar(root.rstrip("/"), sources.type), sources, pa.scalar("/", sources.type)
    )
    urls = pc.if_else(pc.or_(is_url, is_absolute), sources, joined)
    by_hand = pc.and_(is_url, pc.invert(pc.match_substring_regex(sources, _TIDY_URL)))
    if scheme_of(root) is not None:
        relative = pc.invert(pc.or_(is_url, is_absolute))
        by_hand = pc.or_(by_hand, pc.and_(relative, pc.match_substring_regex(sources, UNTIDY)))
    rows = pc.indices_nonzero(pc.and_(by_hand, kept)).to_pylist()
    if not rows:
        return urls, pa.array([True] * len(sources), pa.bool_())
    found, good = urls.to_pylist(), [True] * len(sources)
    for row in rows:
        source = sources[row].as_py()
        try:
            found[row] = join(root, source)
        except InputError as error:
            good[row] = False
            refusals.add(source, "bad_path", f"row {batch.numbers[row]}: {error}")
    return pa.array(found, pa.large_string()), pa.array(good, pa.bool_())
