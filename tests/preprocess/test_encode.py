"""Encoding shards without Ray."""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess.config import PreprocessConfig
from preprocess.decode import decode_sample, probe_clip
from preprocess.encode import Encoders
from preprocess.plan import ShardTask, make_plan
from shared.cache.dataset import Cache, CommittedShard
from shared.cache.ledger import Refusal
from shared.cache.reader import StreamReader
from shared.errors import InputError
from shared.media.manifest import read_manifest
from shared.media.probe import Probe
from shared.spec import Bucket

BUCKET = Bucket(4, 64, 64)


@pytest.fixture(scope="module")
def config(clips_folder: Path) -> PreprocessConfig:
    return PreprocessConfig(
        preset="demo", manifest=clips_folder / "clips.csv", output="/unused", buckets=(str(BUCKET),)
    ).resolved()


@pytest.fixture(scope="module")
def encoders(config: PreprocessConfig) -> Encoders:
    return Encoders(config)


@pytest.fixture
def task(clips_folder: Path) -> ShardTask:
    """Every clip of the manifest that is a video, in one shard."""
    clips = [(clip, probe_clip(clip.source, clip.path)) for clip in read_manifest(clips_folder / "clips.csv").clips]
    plan = make_plan(
        [(clip, facts) for clip, facts in clips if isinstance(facts, Probe)],
        buckets=[BUCKET],
        sources=(),
        buckets_per_clip="best",
        frame_interval=1,
        shard_samples=lambda _: 64,
        sample_bytes=lambda *_: 1,
        streams=("latent", "text.t5"),
        committed={},
        removed={},
        refused=(),
    )
    return plan.tasks[0]


def decoded(task: ShardTask) -> Iterable[np.ndarray | Refusal]:
    return [decode_sample(sample, task.bucket) for sample in task.samples]


def test_a_shard_holds_what_the_encoders_give(tmp_path: Path, encoders: Encoders, task: ShardTask) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    clips = list(decoded(task))
    events = list(encoders.encode_shard(cache.store, task, clips))
    assert events[:-1] == [None] * len(task.samples)
    assert isinstance(events[-1], CommittedShard)
    rows = {row["sample"]: row for row in cache.read_index().to_pylist()}
    reader = StreamReader(cache.store)
    for sample, frames in zip(task.samples, clips, strict=True):
        row = rows[sample.sample]
        latent = encoders.vae.encode(frames, seed=sample.sample)
        assert torch.equal(reader.latent(row["latent"]), latent.bfloat16())
        texts = encoders.text_encoder.encode(list(sample.captions))
        for entry, expected in zip(row["text.t5"]["captions"], texts, strict=True):
            stored = reader.text(entry, row["text.t5"]["channels"])
            torch.testing.assert_close(stored, expected.bfloat16(), atol=0.01, rtol=0.01)
    assert sorted(len(row["text.t5"]["captions"]) for row in rows.values()) == [1, 1, 1, 1, 1, 2]


def test_encoding_again_gives_the_same_bytes(tmp_path: Path, encoders: Encoders, task: ShardTask) -> None:
    files = []
    for name in ("one", "two"):
        cache = Cache.open_or_create(tmp_path / name, encoders.provenance())
        *_, shard = encoders.encode_shard(cache.store, task, decoded(task))
        assert isinstance(shard, CommittedShard)
        files.append((tmp_path / name / shard.shard).read_bytes())
    assert files[0] == files[1]


def test_a_clip_that_cannot_be_decoded_costs_itself_alone(tmp_path: Path, encoders: Encoders, task: ShardTask) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    clips = list(decoded(task))
    guilty = task.samples[2]
    clips[2] = Refusal(source=guilty.source, sample=guilty.sample, reason="not_decodable", detail="because")
    events = list(encoders.encode_shard(cache.store, task, clips))
    assert events[2] == clips[2]
    assert set(cache.read_index()["sample"].to_pylist()) == {sample.sample for sample in task.samples} - {guilty.sample}
    assert cache.read_ledger()["sample"].to_pylist() == [guilty.sample]


def test_captions_that_cleaning_empties_are_not_stored_as_empty_text(
    tmp_path: Path, encoders: Encoders, task: ShardTask
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    first, second, *others = task.samples
    first = dataclasses.replace(first, captions=("一只鸟在树枝上",))
    second = dataclasses.replace(second, captions=("12345678", "a tower"))
    list(encoders.encode_shard(cache.store, dataclasses.replace(task, samples=(first, second, *others)), decoded(task)))
    assert cache.read_ledger().to_pylist()[0]["reason"] == "no_caption_left"
    committed, _ = cache.committed_samples("text.t5")
    assert first.sample not in committed
    assert [caption for caption, _ in committed[second.sample].captions] == ["a tower"]


def test_a_latent_that_is_not_finite_costs_its_clip_alone(
    tmp_path: Path, encoders: Encoders, task: ShardTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open_or_create(tmp_path, encoders.provenance())
    encode, calls = encoders.vae.encode, itertools.count()
    monkeypatch.setattr(
        encoders.vae,
        "encode",
        lambda frames, *, seed: encode(frames, seed=seed) * (float("nan") if next(calls) == 1 else 1.0),
    )
    list(encoders.encode_shard(cache.store, task, decoded(task)))
    assert len(cache.read_index()) == len(task.samples) - 1
    assert cache.read_ledger()["reason"].to_pylist() == ["not_storable"]


def test_a_bucket_that_the_vae_does_not_divide_is_refused_before_weights_are_loaded(
    config: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.encoders.vae.VideoAutoencoder.load", lambda *_, **__: pytest.fail("weights loaded"))
    with pytest.raises(InputError, match="height=60 is not divisible by the VAE's spatial stride of 8: use 56 or 64"):
        Encoders(dataclasses.replace(config, buckets=("4x60x64",)))


def test_a_file_that_is_gone_when_it_is_decoded_is_tried_again_next_time(task: ShardTask) -> None:
    gone = dataclasses.replace(task.samples[0], path=Path("/nowhere/clip.mp4"))
    refusal = decode_sample(gone, task.bucket)
    assert isinstance(refusal, Refusal)
    assert refusal.sample is None
