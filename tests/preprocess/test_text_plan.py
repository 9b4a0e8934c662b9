"""Which texts are encoded by themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from preprocess.text_plan import SampleTexts, changed_texts, shared_text_tasks, text_tasks
from shared.cache.committed import CommittedSamples, CommittedTexts, Removed, caption_sums
from shared.cache.dataset import Cache
from shared.cache.identity import identity_numbers, text_id
from shared.cache.live import find_live
from shared.clips.texts import Caption, identify
from shared.fingerprints import Lookup
from tests.shared.clips.planning import PROVENANCE, clip, manifest_of

Known = tuple[Sequence[str], int, int]
"""Captions, generation of the latent, generation of the texts."""
Generations = Callable[..., dict[str, int]]


@pytest.fixture
def empty_cache(tmp_path: Path) -> Cache:
    return Cache.open_or_create(tmp_path / "cache", PROVENANCE)


def clean(caption: str) -> str:
    return caption.strip().lower()


def known(*captions: str, generation: int = 0, text_generation: int = 0) -> Known:
    return captions, generation, text_generation


@pytest.fixture
def generations(empty_cache: Cache) -> Generations:
    """Returns in which generations samples get new texts."""

    def changed(committed: dict[str, Known], **wanted: tuple[str, ...]) -> dict[str, int]:
        names = {name: f"{number:032x}" for number, name in enumerate(committed)}
        numbers = identity_numbers(list(names.values()))
        values = list(committed.values())
        ids = [text_id(clean(caption)) for captions, _, _ in values for caption in captions]
        samples = CommittedSamples(
            numbers=numbers,
            lookup=Lookup(numbers),
            generations=np.array([generation for _, generation, _ in values], np.int32),
            texts=CommittedTexts(
                generations=np.array([generation for _, _, generation in values], np.int32),
                captions=caption_sums(pa.array([list(captions) for captions, _, _ in values], pa.list_(pa.string()))),
                ends=np.cumsum([len(captions) for captions, _, _ in values]),
                ids=identity_numbers(ids),
            ),
            removed=Removed.of({}),
            cache=empty_cache,
            live=find_live(empty_cache, []),
        )
        manifest = manifest_of(clip(name, captions=captions).clip for name, captions in wanted.items())
        rows = np.array([list(committed).index(name) for name in wanted])
        found = changed_texts(rows, np.arange(len(rows)), manifest, samples, clean)
        by_identity = {identity: name for name, identity in names.items()}
        return {by_identity[texts.sample]: texts.generation for texts in found}

    return changed


def test_equal_and_equally_cleaned_captions_are_not_encoded_again(generations: Generations) -> None:
    committed = {"a": known("One", "two"), "b": known("One")}
    assert generations(committed, a=("two", "One"), b=(" one ",)) == {}


def test_changed_captions_get_the_next_generation(generations: Generations) -> None:
    committed = {"a": known("one"), "b": known("one", text_generation=3), "c": known("one", generation=2)}
    assert generations(committed, a=("two",), b=("one", "two"), c=("two",)) == {"a": 1, "b": 4, "c": 2}


def test_a_sample_without_texts_gets_them_in_the_generation_of_its_latent(generations: Generations) -> None:
    committed = {"a": known(text_generation=-1), "b": known(generation=2, text_generation=-1)}
    assert generations(committed, a=("one",), b=("one",)) == {"a": 0, "b": 2}


def test_a_sample_whose_new_captions_cleaning_empties_keeps_its_own(generations: Generations) -> None:
    assert generations({"a": known("one")}, a=("  ",)) == {}


def test_captions_that_cleaning_makes_equal_are_one_text() -> None:
    assert [text.caption for text in identify(["One", "one ", "two", "  "], clean)] == ["One", "two"]


def test_shards_of_texts_hold_one_generation_and_are_named_by_what_they_hold() -> None:
    texts = [
        SampleTexts(sample=f"{n}", captions=(Caption(caption="x", id=f"t{n}"),), generation=n % 2) for n in range(7)
    ]
    tasks = text_tasks(texts, stream="text.t5", shard_samples=3, text_bytes=1)
    assert [[texts.sample for texts in task.samples] for task in tasks] == [["0", "2", "4"], ["6"], ["1", "3", "5"]]
    assert len({task.shard_id for task in tasks}) == 3
    assert tasks[0].shard_id != text_tasks(texts, stream="text.other", shard_samples=3, text_bytes=1)[0].shard_id


def test_shards_of_texts_hold_a_gigabyte_at_most() -> None:
    texts = [
        SampleTexts(sample=f"{n}", captions=(Caption(caption="x", id=f"t{n}"),) * (n + 1), generation=0)
        for n in range(4)
    ]
    tasks = text_tasks(texts, stream="text.t5", shard_samples=3, text_bytes=300_000_000)
    assert [[texts.sample for texts in task.samples] for task in tasks] == [["0", "1"], ["2"], ["3"]]


def test_shared_texts_that_are_stored_are_not_encoded_again() -> None:
    captions = [Caption(caption=f"c{n % 4}", id=f"t{n % 4}") for n in range(8)]
    tasks = shared_text_tasks(captions, {"t1"}, stream="text.t5", shard_texts=2, text_bytes=1)
    assert [[text.id for text in task.captions] for task in tasks] == [["t0", "t2"], ["t3"]]
