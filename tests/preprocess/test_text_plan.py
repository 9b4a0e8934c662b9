"""Which texts are encoded by themselves."""

from preprocess.text_plan import Caption, SampleTexts, changed_texts, identify, shared_text_tasks, text_tasks
from shared.cache.dataset import CommittedSample
from shared.cache.identity import text_id


def clean(caption: str) -> str:
    return caption.strip().lower()


def known(*captions: str, generation: int = 0, text_generation: int = 0) -> CommittedSample:
    return CommittedSample(
        source="a.mp4",
        source_version="1",
        generation=generation,
        captions=tuple((caption, text_id(clean(caption))) for caption in captions),
        text_generation=text_generation,
    )


def generations(committed: dict[str, CommittedSample], **wanted: tuple[str, ...]) -> dict[str, int]:
    return {texts.sample: texts.generation for texts in changed_texts(wanted.items(), committed, clean)}


def test_equal_and_equally_cleaned_captions_are_not_encoded_again() -> None:
    committed = {"a": known("One", "two"), "b": known("One")}
    assert generations(committed, a=("two", "One"), b=(" one ",)) == {}


def test_changed_captions_get_the_next_generation() -> None:
    committed = {"a": known("one"), "b": known("one", text_generation=3), "c": known("one", generation=2)}
    assert generations(committed, a=("two",), b=("one", "two"), c=("two",)) == {"a": 1, "b": 4, "c": 2}


def test_a_sample_without_texts_gets_them_in_the_generation_of_its_latent() -> None:
    committed = {"a": known(text_generation=-1), "b": known(generation=2, text_generation=-1)}
    assert generations(committed, a=("one",), b=("one",)) == {"a": 0, "b": 2}


def test_a_sample_whose_new_captions_cleaning_empties_keeps_its_own() -> None:
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


def test_shared_texts_that_are_stored_are_not_encoded_again() -> None:
    captions = [Caption(caption=f"c{n % 4}", id=f"t{n % 4}") for n in range(8)]
    tasks = shared_text_tasks(captions, {"t1"}, stream="text.t5", shard_texts=2, text_bytes=1)
    assert [[text.id for text in task.captions] for task in tasks] == [["t0", "t2"], ["t3"]]
