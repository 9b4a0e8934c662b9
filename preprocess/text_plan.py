"""Which texts are to be encoded by themselves: changed captions, a new text encoder, texts that samples share. Pure."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from preprocess.plan import chunks
from shared.cache.dataset import CommittedSample
from shared.cache.identity import shard_id, text_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A caption as the manifest gives it, and the identity of its cleaned text."""

    caption: str
    id: str


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


def identify(captions: Iterable[str], clean: Callable[[str], str]) -> tuple[Caption, ...]:
    """Returns the captions of which cleaning leaves something, each distinct text once."""
    by_id: dict[str, str] = {}
    for caption in captions:
        if cleaned := clean(caption):
            by_id.setdefault(text_id(cleaned), caption)
    return tuple(Caption(caption=caption, id=identity) for identity, caption in by_id.items())


def changed_texts(
    wanted: Iterable[tuple[str, Sequence[str]]],
    committed: Mapping[str, CommittedSample],
    clean: Callable[[str], str],
) -> list[SampleTexts]:
    """Returns the committed samples whose texts are others in the manifest, or are lacking.

    A sample of whose captions cleaning leaves nothing keeps those that it has.

    Args:
        wanted: Samples with the captions that the manifest gives them.
        committed: By sample.
        clean: How captions are cleaned.
    """
    changed = []
    for sample, captions in wanted:
        known = committed[sample]
        if known.captions and {caption for caption, _ in known.captions} == set(captions):
            continue
        texts = identify(captions, clean)
        if texts and {text.id for text in texts} != {identity for _, identity in known.captions}:
            generation = max(known.text_generation + 1, known.generation)
            changed.append(SampleTexts(sample=sample, captions=texts, generation=generation))
    return changed


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
        for chunk in chunks(samples, sizes, shard_samples):
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
        for chunk in chunks(missing, [text_bytes] * len(missing), shard_texts)
    ]
