"""Encoding shards without Ray."""

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess.config import PreprocessConfig
from preprocess.encode import Begun, Encoded, Event, ShardEncoder
from preprocess.encoders import Encoders
from shared.cache.dataset import Cache, CommittedShard
from shared.cache.ledger import Refusal
from shared.cache.reader import StreamReader
from shared.clips.decode import Frames, Postponed, decode_sample
from shared.clips.plan import ShardTask
from shared.errors import InputError
from shared.media.clip import Media
from shared.spec import Bucket
from tests.preprocess.real_task import real_task

BUCKET = Bucket(4, 64, 64)


@pytest.fixture(scope="module")
def config(clips_folder: Path) -> PreprocessConfig:
    return PreprocessConfig(
        preset="demo", manifest=str(clips_folder / "clips.csv"), output="/unused", buckets=(str(BUCKET),)
    ).resolved()


@pytest.fixture(scope="module")
def encoders(config: PreprocessConfig) -> Encoders:
    return Encoders(config)


@pytest.fixture(scope="module")
def shards(encoders: Encoders, config: PreprocessConfig, clips_folder: Path) -> ShardEncoder:
    return ShardEncoder(encoders, config, str(clips_folder))


@pytest.fixture(scope="module")
def task(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardTask:
    """Every clip of the manifest that is a video, in one shard."""
    return real_task(clips_folder / "clips.csv", BUCKET, tmp_path_factory.mktemp("probes"))


def decoded(task: ShardTask) -> list[Frames]:
    return [decode_sample(sample, task.bucket) for sample in task.samples]


def test_a_shard_holds_what_the_encoders_give(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    clips = list(decoded(task))
    events = list(shards.encode_shard(cache.store, task, clips))
    assert events[:-1] == [Begun(), *[Encoded()] * len(task.samples)]
    assert isinstance(events[-1], CommittedShard)
    rows = {row["sample"]: row for row in cache.read_index().to_pylist()}
    reader = StreamReader(cache.store)
    for sample, frames in zip(task.samples, clips, strict=True):
        row = rows[sample.sample]
        latent = encoders.vae.encode(frames, seed=sample.sample)
        assert torch.equal(reader.latent(row["latent"]), latent.bfloat16())
        texts = encoders.text.encode(list(sample.captions))
        for entry, expected in zip(row["text.t5"]["captions"], texts, strict=True):
            stored = reader.text(entry, row["text.t5"]["channels"])
            torch.testing.assert_close(stored, expected.bfloat16(), atol=0.01, rtol=0.01)
    assert sorted(len(row["text.t5"]["captions"]) for row in rows.values()) == [1, 1, 1, 1, 1, 2]


def test_encoding_again_gives_the_same_bytes(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    files = []
    for name in ("one", "two"):
        cache = Cache.open_or_create(tmp_path / name, encoders.provenance())
        *_, shard = shards.encode_shard(cache.store, task, decoded(task))
        assert isinstance(shard, CommittedShard)
        files.append((tmp_path / name / shard.shard).read_bytes())
    assert files[0] == files[1]


def test_a_clip_that_cannot_be_decoded_costs_itself_alone(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    clips = list(decoded(task))
    guilty = task.samples[2]
    clips[2] = Refusal(source=guilty.source, sample=guilty.sample, reason="not_decodable", detail="because")
    events = list(shards.encode_shard(cache.store, task, clips))
    assert clips[2] in events
    assert set(cache.read_index()["sample"].to_pylist()) == {sample.sample for sample in task.samples} - {guilty.sample}
    assert cache.read_ledger()["sample"].to_pylist() == [guilty.sample]


def test_captions_that_cleaning_empties_are_not_stored_as_empty_text(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    first, second, *others = task.samples
    first = dataclasses.replace(first, captions=("一只鸟在树枝上",))
    second = dataclasses.replace(second, captions=("12345678", "a tower"))
    list(shards.encode_shard(cache.store, dataclasses.replace(task, samples=(first, second, *others)), decoded(task)))
    assert cache.read_ledger().to_pylist()[0]["reason"] == "no_caption_left"
    rows = {row["sample"]: row for row in cache.read_index().to_pylist()}
    assert first.sample not in rows
    assert [entry["caption"] for entry in rows[second.sample]["text.t5"]["captions"]] == ["a tower"]


def test_a_latent_that_is_not_finite_costs_its_clip_alone(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    encode_each = encoders.vae.encode_each

    def encode_badly(clips: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (seed, latent) in enumerate(encode_each(clips)):
            yield seed, latent * (float("nan") if number == 1 else 1.0)

    monkeypatch.setattr(encoders.vae, "encode_each", encode_badly)
    list(shards.encode_shard(cache.store, task, decoded(task)))
    assert len(cache.read_index()) == len(task.samples) - 1
    assert cache.read_ledger()["reason"].to_pylist() == ["not_storable"]


def test_a_bucket_that_the_vae_does_not_divide_is_refused_before_weights_are_loaded(
    config: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.encoders.vae.VideoAutoencoder.load", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(InputError, match="height=60 is not divisible by the VAE's spatial stride of 8: use 56 or 64"):
        Encoders(dataclasses.replace(config, buckets=("4x60x64",)))


def test_a_file_that_is_gone_when_it_is_decoded_is_tried_again_next_time(task: ShardTask) -> None:
    gone = dataclasses.replace(task.samples[0], media=Media(url="/nowhere/clip.mp4"))
    refusal = decode_sample(gone, task.bucket)
    assert isinstance(refusal, Refusal)
    assert refusal.sample is None


def test_a_clip_that_has_fewer_frames_than_its_probe_said_stays_pending(task: ShardTask) -> None:
    sample = task.samples[0]
    late = dataclasses.replace(sample, window=dataclasses.replace(sample.window, start=10**6))
    found = decode_sample(late, task.bucket)
    assert isinstance(found, Postponed)
    assert found.reason == "probe_outdated"


def test_a_postponed_clip_enters_neither_shard_nor_ledger(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    clips = decoded(task)
    late = task.samples[0]
    clips[0] = Postponed(sample=late.sample, source=late.source, reason="not_reachable", detail="a time-out")
    events = list(shards.encode_shard(cache.store, task, clips))
    assert clips[0] in events
    assert late.sample not in cache.read_index()["sample"].to_pylist()
    assert not len(cache.read_ledger())


def test_a_clip_is_fetched_while_the_one_before_is_encoded(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, asked = Cache.open_or_create(tmp_path, encoders.provenance()), threading.Event()
    clips, encode_each = decoded(task), encoders.vae.encode_each

    def fetched() -> Iterator[Frames]:
        yield clips[0]
        asked.set()
        yield from clips[1:]

    def encode(taken: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, torch.Tensor]]:
        for seed, latent in encode_each(taken):
            assert asked.wait(30), "the second clip was not asked for while the first was encoded"
            yield seed, latent

    monkeypatch.setattr(encoders.vae, "encode_each", encode)
    *_, shard = shards.encode_shard(cache.store, task, fetched())
    assert isinstance(shard, CommittedShard)
    assert shard.num_samples == len(clips)


def test_what_goes_wrong_while_a_clip_is_fetched_ends_the_shard_and_its_turn(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())

    def failing() -> Iterator[Frames]:
        yield from decoded(task)[:1]
        raise InputError("this GPU has no decoders")

    with pytest.raises(InputError, match="this GPU has no decoders"):
        list(shards.encode_shard(cache.store, task, failing()))
    assert not shards.turns.waiting
    assert not len(cache.read_index())


def test_the_thread_that_fetches_clips_ends_with_its_shard(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    list(shards.encode_shard(cache.store, task, decoded(task)))
    end_of_fetching()

    def refuse_second(taken: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (seed, _) in enumerate(taken):
            if number:
                raise InputError("has not the memory for one frame")
            yield seed, torch.zeros(4, 1, 2, 2)

    monkeypatch.setattr(encoders.vae, "encode_each", refuse_second)
    with pytest.raises(InputError, match="has not the memory"):
        list(shards.encode_shard(cache.store, task, decoded(task)))
    end_of_fetching()


def end_of_fetching() -> None:
    """Waits until no thread fetches clips."""
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(30)
            assert not thread.is_alive(), "a thread waits for what nobody will ask for"


def test_embeddings_of_another_worker_give_the_same_bytes(
    tmp_path: Path, config: PreprocessConfig, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    captions = sorted({caption for sample in task.samples for caption in sample.captions})
    elsewhere = ShardEncoder(Encoders(config, "text"), config, "/clips").embed(captions)
    files = []
    for name, embeddings in (("here", None), ("elsewhere", elsewhere)):
        cache = Cache.open_or_create(tmp_path / name, encoders.provenance())
        *_, shard = shards.encode_shard(cache.store, task, decoded(task), embeddings=embeddings)
        assert isinstance(shard, CommittedShard)
        files.append((tmp_path / name / shard.shard).read_bytes())
    assert files[0] == files[1]


def test_shards_that_are_encoded_at_once_have_the_bytes_of_those_encoded_one_by_one(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask
) -> None:
    halves = [
        dataclasses.replace(task, shard_id=name, samples=part)
        for name, part in (("aa" * 16, task.samples[:3]), ("bb" * 16, task.samples[3:]))
    ]
    one_by_one = Cache.open_or_create(tmp_path / "one", encoders.provenance())
    for half in halves:
        list(shards.encode_shard(one_by_one.store, half, decoded(half)))
    at_once = Cache.open_or_create(tmp_path / "two", encoders.provenance())
    tickets = [shards.turns.next() for _ in halves]
    threads = [
        threading.Thread(target=lambda h, t: list(shards.encode_shard(at_once.store, h, decoded(h), turn=t)), args=pair)
        for pair in zip(reversed(halves), reversed(tickets), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    names = [
        sorted(path.name for path in (tmp_path / name / "shards" / str(BUCKET)).iterdir()) for name in ("one", "two")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_a_clip_that_was_replaced_since_it_was_probed_is_not_stored_under_its_old_identity(
    task: ShardTask, tmp_path: Path
) -> None:
    sample, other = task.samples[:2]
    (tmp_path / "clip.mp4").write_bytes(Path(other.media.url).read_bytes())
    replaced = dataclasses.replace(sample, media=Media(url=str(tmp_path / "clip.mp4")))
    found = decode_sample(replaced, task.bucket)
    assert isinstance(found, Postponed)
    assert found.reason == "probe_outdated"


def test_captions_become_tokens_before_a_shard_has_its_turn(
    tmp_path: Path, encoders: Encoders, shards: ShardEncoder, task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoders.text is not None
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    is_tokenised, tokenize = threading.Event(), encoders.text.tokenize
    events: list[Event] = []

    def noted(cleaned: Sequence[str]) -> list[list[int]]:
        tokens = tokenize(cleaned)
        is_tokenised.set()
        return tokens

    monkeypatch.setattr(encoders.text, "tokenize", noted)
    before, ticket = shards.turns.next(), shards.turns.next()
    clips = decoded(task)
    thread = threading.Thread(
        target=lambda: events.extend(shards.encode_shard(cache.store, task, clips, turn=ticket)), daemon=True
    )
    thread.start()
    assert is_tokenised.wait(60)
    assert not events
    before.give_up()
    thread.join(60)
    assert isinstance(events[-1], CommittedShard)
