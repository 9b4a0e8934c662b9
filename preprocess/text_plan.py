"""Which texts are to be encoded by themselves: changed captions, a new text encoder, texts that samples share. Pure."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shared.cache.committed import CommittedSamples, caption_sums
from shared.cache.identity import identity_texts, shard_id
from shared.clips.plan import chunk_bounds
from shared.clips.texts import Caption, identify
from shared.media.manifest import Manifest
from shared.windows import Integers

Item = TypeVar("Item")

_ROWS_AT_ONCE = 1 << 16


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


def changed_texts(
    samples: Integers,
    clips: Integers,
    manifest: Manifest,
    committed: CommittedSamples,
    clean: Callable[[str], str],
) -> list[SampleTexts]:
    """Returns the committed samples whose texts are others in the manifest, or are lacking.

    A sample of whose captions cleaning leaves nothing keeps those that it has.

    Args:
        samples: (M,), rows of committed samples.
        clips: (M,), the rows of the manifest that say what their captions should be.
        manifest: What it says.
        committed: Of the cache.
        clean: How captions are cleaned.
    """
    known = committed.texts
    wanted = _caption_sums(manifest)
    same = (known.captions[samples] == wanted[clips]) & (known.num_captions()[samples] > 0)
    all_clips = manifest.clips
    names = committed.numbers[samples[~same]]
    changed = []
    for sample, row, clip in zip(identity_texts(names), samples[~same].tolist(), clips[~same].tolist(), strict=True):
        texts = identify(all_clips[clip].captions, clean)
        if texts and {text.id for text in texts} != known.ids_of(row):
            generation = max(int(known.generations[row]) + 1, int(committed.generations[row]))
            changed.append(SampleTexts(sample=sample, captions=texts, generation=generation))
    return changed


def _caption_sums(manifest: Manifest) -> npt.NDArray[np.uint64]:
    chunks = [batch.column(0) for batch in manifest.table.select(["captions"]).to_batches(max_chunksize=_ROWS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.uint64), *(caption_sums(chunk) for chunk in chunks)])


def text_tasks(changed: Sequence[SampleTexts], *, stream: str, shard_samples: int, text_bytes: int) -> list[TextTask]:
    """Returns shards of new texts of committed samples.

    Args:
        changed: What to encode.
        stream: Of the texts.
        shard_samples: Samples a shard, at most.
        text_bytes: Of a caption before entropy coding; a shard has 1 GB at most.
    """
    by_generation: dict[int, list[SampleTexts]] = defaultdict(list)
    for texts in changed:
        by_generation[texts.generation].append(texts)
    tasks = []
    for generation, samples in sorted(by_generation.items()):
        sizes = [text_bytes * len(texts.captions) for texts in samples]
        for chunk in _chunks(samples, sizes, shard_samples):
            members = [part for texts in chunk for part in (texts.sample, *(text.id for text in texts.captions))]
            identity = shard_id(members, streams=[stream], generation=generation)
            tasks.append(TextTask(shard_id=identity, samples=tuple(chunk)))
    return tasks


def shared_text_tasks(
    captions: Iterable[Caption], stored: Collection[str], *, stream: str, shard_texts: int, text_bytes: int
) -> list[SharedTextTask]:
    """Returns shards of the texts that are not stored yet, each distinct one once. Arguments as above."""
    missing = list({text.id: text for text in captions if text.id not in stored}.values())
    return [
        SharedTextTask(shard_id=shard_id((text.id for text in chunk), streams=[stream]), captions=tuple(chunk))
        for chunk in _chunks(missing, [text_bytes] * len(missing), shard_texts)
    ]


def _chunks(items: Sequence[Item], sizes: Sequence[int], most: int) -> Iterator[Sequence[Item]]:
    """Yields the items of each shard, see ``chunk_bounds``."""
    if items:
        for start, end in pairwise(chunk_bounds(sizes, most).tolist()):
            yield items[start:end]
