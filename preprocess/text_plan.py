"""Which texts are to be encoded by themselves: changed captions, a new text encoder, texts that samples share.

Pure, and columnar: of ten million captions some numbers are kept, and tasks are made when they are handed out.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from shared.cache.committed import CommittedSamples, caption_sums
from shared.cache.identity import identity_numbers, identity_texts, shard_id
from shared.cache.shared_texts import SharedTexts
from shared.clips.plan import chunk_bounds
from shared.clips.samples import TakenRows
from shared.clips.texts import Caption, identify
from shared.fingerprints import Lookup, Numbers
from shared.media.manifest import Manifest
from shared.windows import Integers

Task = TypeVar("Task")

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTexts:
    """The captions that a committed sample should have."""

    sample: str
    captions: tuple[Caption, ...]
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTask:
    """New texts of committed samples, in one shard (or, where all of them lie somewhere already, in none)."""

    shard_id: str
    samples: tuple[SampleTexts, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTextTask:
    """Texts that samples share, to be encoded once, in one shard."""

    shard_id: str
    captions: tuple[Caption, ...]


def num_members(task: TextTask | SharedTextTask) -> int:
    """Returns how many samples or texts a task is about."""
    return len(task.samples) if isinstance(task, TextTask) else len(task.captions)


class CaptionReader:
    """Reads captions of a manifest, and cleans them.

    Args:
        manifest: The manifest.
        clean: How.
    """

    def __init__(self, manifest: Manifest, clean: Callable[[str], str]) -> None:
        self.clean = clean
        self._rows = TakenRows(manifest.table.select(["captions"]))

    def captions(self, rows: Integers) -> list[list[str]]:
        """Returns the captions of clips (n,), in any order."""
        distinct, places = np.unique(rows, return_inverse=True)
        lists: list[list[str]] = self._rows.take(distinct)["captions"].to_pylist()
        return [lists[place] for place in places.tolist()]

    def identified(self, rows: Integers) -> list[tuple[Caption, ...]]:
        """Returns of clips (n,), in any order, the captions of which cleaning leaves something."""
        return [identify(captions, self.clean) for captions in self.captions(rows)]


class _Tasks(Sequence[Task]):
    """Tasks, each made when it is asked for.

    Args:
        shards: (N, 2), where the members of each begin and end.
    """

    def __init__(self, shards: Integers) -> None:
        self._shards = shards

    @abstractmethod
    def _made(self, first: int, end: int) -> Task:
        """Returns the task of the members from ``first`` to ``end``."""

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def num_members(self) -> int:
        """Members of all tasks."""
        return int((self._shards[:, 1] - self._shards[:, 0]).sum())

    @overload
    def __getitem__(self, place: int) -> Task: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Task]: ...
    def __getitem__(self, place: int | slice) -> Task | Sequence[Task]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        first, end = self._shards[place].tolist()
        return self._made(first, end)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedTexts:
    """Committed samples (n,) whose texts are others in the manifest, or are lacking."""

    numbers: Numbers
    """(n, 2): their identities."""
    clips: Integers
    """(n,): the rows of the manifest that say what their captions should be."""
    generations: npt.NDArray[np.int32]
    """(n,): of the texts to come, ascending."""
    num_captions: npt.NDArray[np.int32]
    """(n,): of which cleaning leaves something."""


def changed_texts(
    samples: Integers, clips: Integers, manifest: Manifest, committed: CommittedSamples, reader: CaptionReader
) -> ChangedTexts:
    """Returns the committed samples whose texts are others in the manifest, or are lacking.

    A sample of whose captions cleaning leaves nothing keeps those that it has.

    Args:
        samples: (M,), rows of committed samples.
        clips: (M,), the rows of the manifest that say what their captions should be.
        manifest: What it says.
        committed: Of the cache.
        reader: Of the manifest's captions.
    """
    known = committed.texts
    wanted = _caption_sums(manifest)
    same = (known.captions[samples] == wanted[clips]) & (known.num_captions()[samples] > 0)
    samples, clips = samples[~same], clips[~same]
    counts = np.zeros(len(samples), np.int32)
    for start in range(0, len(samples), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        for place, texts in enumerate(reader.identified(clips[some]), start):
            if texts and {text.id for text in texts} != known.ids_of(int(samples[place])):
                counts[place] = len(texts)
    is_changed = counts > 0
    samples, clips, counts = samples[is_changed], clips[is_changed], counts[is_changed]
    generations = np.maximum(known.generations[samples] + 1, committed.generations[samples])
    order = np.argsort(generations, kind="stable")
    return ChangedTexts(
        numbers=committed.numbers[samples[order]],
        clips=clips[order],
        generations=generations[order],
        num_captions=counts[order],
    )


def _caption_sums(manifest: Manifest) -> npt.NDArray[np.uint64]:
    chunks = [batch.column(0) for batch in manifest.table.select(["captions"]).to_batches(max_chunksize=_ROWS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.uint64), *(caption_sums(chunk) for chunk in chunks)])


class TextTasks(_Tasks[TextTask]):
    """Shards of new texts of committed samples, each of one generation.

    Args:
        changed: What to encode.
        reader: Of its captions.
        stream: Of the texts.
        shard_samples: Samples a shard, at most.
        text_bytes: Of a caption before entropy coding; a shard has 1 GB at most.
    """

    def __init__(
        self, changed: ChangedTexts, reader: CaptionReader, *, stream: str, shard_samples: int, text_bytes: int
    ) -> None:
        shards = [np.empty((0, 2), np.int64)]
        borders = np.flatnonzero(np.diff(changed.generations, prepend=-1, append=-1))
        for first, end in pairwise(borders.tolist()):
            sizes = changed.num_captions[first:end].astype(np.int64) * text_bytes
            bounds = chunk_bounds(sizes, shard_samples) + first
            shards.append(np.stack([bounds[:-1], bounds[1:]], axis=1))
        super().__init__(np.concatenate(shards))
        self._changed, self._reader, self._stream = changed, reader, stream

    @property
    def num_captions(self) -> int:
        """Captions of all samples."""
        return int(self._changed.num_captions.sum())

    def _made(self, first: int, end: int) -> TextTask:
        changed = self._changed
        generation = int(changed.generations[first])
        names, captions = identity_texts(changed.numbers[first:end]), self._reader.identified(changed.clips[first:end])
        samples = tuple(
            SampleTexts(sample=name, captions=texts, generation=generation)
            for name, texts in zip(names, captions, strict=True)
        )
        members = [part for texts in samples for part in (texts.sample, *(text.id for text in texts.captions))]
        return TextTask(shard_id=shard_id(members, streams=[self._stream], generation=generation), samples=samples)


class TextIds:
    """The identities of the texts of captions, by the captions as the manifest gives them.

    Args:
        prints: (C,), fingerprints of captions of which cleaning leaves something.
        numbers: (C, 2), the identities of their texts.
    """

    def __init__(self, prints: Numbers, numbers: Numbers) -> None:
        self.numbers, self._lookup = numbers, Lookup(prints)

    def of(self, captions: Iterable[str]) -> set[str]:
        """Returns the identities of some captions; one of which cleaning leaves nothing has none."""
        names = list(captions)
        found = self._lookup.find(np.fromiter(map(hash, names), np.int64, len(names)).view(np.uint64))
        return set(identity_texts(self.numbers[found[found >= 0]]))


class SharedTextTasks(_Tasks[SharedTextTask]):
    """Shards of texts that samples share and that are not stored, each distinct one once, in the manifest's order.

    Args:
        clips: (n,), rows of the manifest whose captions are wanted.
        reader: Of them.
        stored: The texts that are stored.
        stream: Of the texts.
        shard_texts: Texts a shard, at most.
        text_bytes: Of a text before entropy coding; a shard has 1 GB at most.
    """

    def __init__(
        self,
        clips: Integers,
        reader: CaptionReader,
        stored: SharedTexts,
        *,
        stream: str,
        shard_texts: int,
        text_bytes: int,
    ) -> None:
        self._reader, self._stream = reader, stream
        prints, numbers, rows, places = _texts_of(np.unique(clips), reader)
        self.text_ids = TextIds(prints, numbers)
        """Of all captions, whether their texts are stored or not."""
        pairs = numbers.view([("first", np.uint64), ("second", np.uint64)]).ravel()
        first = np.sort(np.unique(pairs, return_index=True)[1])
        missing = first[stored.find(numbers[first]) < 0]
        self._numbers, self._rows, self._places = numbers[missing], rows[missing], places[missing]
        bounds = chunk_bounds(np.full(len(missing), text_bytes, np.int64), shard_texts)
        super().__init__(np.stack([bounds[:-1], bounds[1:]], axis=1))

    def _made(self, first: int, end: int) -> SharedTextTask:
        ids = identity_texts(self._numbers[first:end])
        lists = self._reader.captions(self._rows[first:end])
        captions = tuple(
            Caption(caption=captions[place], id=identity)
            for captions, place, identity in zip(lists, self._places[first:end].tolist(), ids, strict=True)
        )
        return SharedTextTask(shard_id=shard_id(ids, streams=[self._stream]), captions=captions)


def _texts_of(rows: Integers, reader: CaptionReader) -> tuple[Numbers, Numbers, Integers, npt.NDArray[np.int32]]:
    """Returns captions (C,) of which cleaning leaves something, equal ones not often.

    They are given by their fingerprints, the identities (C, 2) of their texts, the rows of the manifest in which they
    stand, and where in these rows.
    """
    prints, numbers = [np.empty(0, np.uint64)], [np.empty((0, 2), np.uint64)]
    clips, places = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found: dict[str, tuple[int, int]] = {}
        some = rows[start : start + _ROWS_AT_ONCE]
        for row, captions in zip(some.tolist(), reader.captions(some), strict=True):
            for place, caption in enumerate(captions):
                found.setdefault(caption, (row, place))
        ids = {caption: text.id for caption in found for text in identify([caption], reader.clean)}
        prints.append(np.fromiter(map(hash, ids), np.int64, len(ids)).view(np.uint64))
        numbers.append(identity_numbers(list(ids.values())))
        clips.append(np.array([found[caption][0] for caption in ids], np.int64))
        places.append(np.array([found[caption][1] for caption in ids], np.int32))
    return np.concatenate(prints), np.concatenate(numbers), np.concatenate(clips), np.concatenate(places)
