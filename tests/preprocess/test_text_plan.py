"""Which texts are encoded by themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from preprocess.text_plan import CaptionReader, ChangedTexts, SharedTextTasks, TextTasks, changed_texts
from shared.cache.committed import CommittedSamples, CommittedTexts, Removed, caption_sums
from shared.cache.dataset import Cache
from shared.cache.identity import identity_numbers, identity_texts, text_id
from shared.cache.live import find_live
from shared.cache.schema import CAPTION
from shared.cache.shared_texts import SharedTexts
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
        found = changed_texts(rows, np.arange(len(rows)), manifest, samples, CaptionReader(manifest, clean))
        by_identity = {identity: name for name, identity in names.items()}
        changed_names = [by_identity[identity] for identity in identity_texts(found.numbers)]
        return dict(zip(changed_names, found.generations.tolist(), strict=True))

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


def text_tasks(
    captions: Sequence[Sequence[str]], generations: Sequence[int], text_bytes: int = 1, stream: str = "text.t5"
) -> TextTasks:
    """Returns shards of three samples at most; those of one generation stand together."""
    manifest = manifest_of(clip(f"{n}", captions=tuple(texts)).clip for n, texts in enumerate(captions))
    changed = ChangedTexts(
        numbers=identity_numbers([f"{n:032x}" for n in range(len(captions))]),
        clips=np.arange(len(captions)),
        generations=np.array(generations, np.int32),
        num_captions=np.array([len(texts) for texts in captions], np.int32),
    )
    reader = CaptionReader(manifest, clean)
    return TextTasks(changed, reader, stream=stream, shard_samples=3, text_bytes=text_bytes)


def members(tasks: TextTasks) -> list[list[int]]:
    """Returns the samples of each shard."""
    return [[int(texts.sample, 16) for texts in task.samples] for task in tasks]


def test_shards_of_texts_hold_one_generation_and_are_named_by_what_they_hold() -> None:
    captions = [["One"], ["two"], ["three"], ["four"], ["five", "six"]]
    tasks = text_tasks(captions, [0, 0, 0, 0, 1])
    assert members(tasks) == [[0, 1, 2], [3], [4]]
    assert (tasks.num_members, tasks.num_captions, len(tasks)) == (5, 6, 3)
    assert [texts.generation for texts in tasks[2].samples] == [1]
    assert tasks[2].samples[0].captions == tuple(Caption(caption=text, id=text_id(text)) for text in captions[4])
    assert len({task.shard_id for task in tasks}) == 3
    assert tasks[0].shard_id != text_tasks(captions, [0, 0, 0, 0, 1], stream="text.other")[0].shard_id
    other = [["another"], *captions[1:]]
    assert tasks[0].shard_id != text_tasks(other, [0, 0, 0, 0, 1])[0].shard_id


def test_shards_of_texts_hold_a_gigabyte_at_most() -> None:
    captions = [[f"{number} {n}" for number in range(n + 1)] for n in range(4)]
    assert members(text_tasks(captions, [0] * 4, text_bytes=300_000_000)) == [[0, 1], [2], [3]]


def test_where_nothing_changed_there_are_no_shards_of_texts() -> None:
    assert list(text_tasks([], [])) == []


def stored_texts(*captions: str) -> SharedTexts:
    """Returns places of texts, of two fragments."""
    rows = [
        {
            "text": {
                "id": text_id(clean(caption)),
                "shard": f"shards/text.t5/{caption}",
                "offset": number,
                "bytes": 1,
                "crc32c": 2,
                "codec": "float32",
                "num_tokens": 3,
            },
            "channels": 8,
        }
        for number, caption in enumerate(captions)
    ]
    fields = [field for field in CAPTION if field.name != "caption"]
    schema = pa.schema([("text", pa.struct(fields)), ("channels", pa.int32())])
    tables = [pa.Table.from_pylist(rows[:1], schema), pa.Table.from_pylist(rows[1:], schema)]
    return SharedTexts(tables, "shards/text.t5/")


def shared_tasks(stored: SharedTexts, *captions: tuple[str, ...]) -> SharedTextTasks:
    """Returns shards of two texts at most."""
    manifest = manifest_of(clip(f"{n}", captions=texts).clip for n, texts in enumerate(captions))
    rows = np.array([*range(len(captions)), 0], np.int64)  # a clip may have several samples
    reader = CaptionReader(manifest, clean)
    return SharedTextTasks(rows, reader, stored, stream="text.t5", shard_texts=2, text_bytes=1)


def test_shared_texts_are_encoded_once_in_the_manifests_order_unless_they_are_stored() -> None:
    tasks = shared_tasks(stored_texts("two"), ("One", "two"), ("one ", "  "), ("Three",), ("four", "Three"))
    assert [[text.caption for text in task.captions] for task in tasks] == [["One", "Three"], ["four"]]
    assert [text.id for text in tasks[0].captions] == [text_id("one"), text_id("three")]
    assert tasks.num_members == 3


def test_a_caption_finds_its_text_by_how_the_manifest_gives_it() -> None:
    ids = shared_tasks(stored_texts("two"), ("One", "two"), ("one ", "  ")).text_ids
    assert ids.of(["One", "one ", "two", "  "]) == {text_id("one"), text_id("two")}
    assert ids.of([]) == set()


def test_places_of_shared_texts_are_found_by_their_identities() -> None:
    stored = stored_texts("one", "two", "two")
    assert (len(stored), set(stored)) == (2, {text_id("one"), text_id("two")})
    place = stored[text_id("two")]
    assert (place["shard"], place["offset"], place["channels"]) == ("shards/text.t5/two", 1, 8)  # the first counts
    assert text_id("three") not in stored
    with pytest.raises(KeyError):
        stored.places([text_id("one"), text_id("three")])
    assert dict(SharedTexts((), "shards/text.t5/")) == {}
    assert text_id("one") not in SharedTexts((), "shards/text.t5/")
