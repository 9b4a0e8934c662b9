"""Samples encoded again, in this process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from preprocess.config import PreprocessConfig
from preprocess.deep import encode_again, latent_tolerance, text_tolerance
from preprocess.encoders import Encoders
from preprocess.originals import Originals
from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache
from shared.cache.identity import shard_id
from shared.cache.rows import Sample, Text, sample_row
from shared.clips.decode import decode_sample
from shared.clips.plan import ShardTask
from shared.clips.texts import identify
from shared.codec import Codec
from shared.errors import InputError
from shared.spec import Bucket
from tests.preprocess.real_task import real_task

BUCKET = Bucket(4, 64, 64)
Change = Callable[[torch.Tensor], torch.Tensor]


def same(values: torch.Tensor) -> torch.Tensor:
    return values


def noisy(values: torch.Tensor, size: float = 0.002) -> torch.Tensor:
    return values + size * values.std() * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))


def broken(values: torch.Tensor) -> torch.Tensor:
    return values.flip(0)


@pytest.fixture(scope="module")
def config(clips_folder: Path) -> PreprocessConfig:
    return PreprocessConfig(
        preset="demo",
        manifest=str(clips_folder / "clips.csv"),
        output="/unused",
        buckets=(str(BUCKET),),
        latent_codec="float32",
        text_codec="float32",
    ).resolved()


@pytest.fixture(scope="module")
def encoders(config: PreprocessConfig) -> Encoders:
    return Encoders(config)


@pytest.fixture(scope="module")
def task(clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardTask:
    """Two clips in one shard, one of them with two captions."""
    whole = real_task(clips_folder / "clips.csv", BUCKET, tmp_path_factory.mktemp("probes"))
    samples = sorted(whole.samples, key=lambda sample: -len(sample.captions))[:2]
    identity = shard_id((sample.sample for sample in samples), streams=("latent", "text.t5"))
    return dataclasses.replace(whole, shard_id=identity, samples=tuple(samples))


def encoded(
    root: Path, encoders: Encoders, task: ShardTask, *, latent: Change, text: Change, environment: dict[str, Any]
) -> Cache:
    """Returns a cache as the encoders make it, but for what ``latent`` and ``text`` do to the arrays."""
    cache = Cache.open_or_create(root, encoders.provenance())
    record = {"clips_root": str(Path(task.samples[0].media.url).parent), "environment": environment, "kind": "samples"}
    assert encoders.vae is not None
    codecs = {"latent": Codec(values="float32"), "text.t5": Codec(values="float32")}
    captions = [caption for sample in task.samples for caption in sample.captions]
    embeddings = iter(encoders.text.encode(captions))
    with ShardWriter(cache.store, shard_id=task.shard_id, folder=str(BUCKET), container="tar", record=record) as writer:
        for sample in task.samples:
            frames = decode_sample(sample, BUCKET)
            texts = [
                Text(id=caption.id, caption=caption.caption, embedding=text(next(embeddings)))
                for caption in identify(sample.captions, encoders.text.clean)
            ]
            made = Sample(
                sample=sample.sample,
                source=sample.source,
                source_version=sample.source_version,
                bucket=BUCKET,
                frame_interval=1,
                fps=sample.fps,
                latent=latent(encoders.vae.encode(frames, seed=sample.sample)),
                texts={"text.t5": texts},
            )
            writer.add(*sample_row(made, codecs, 0))
        writer.commit()
    return cache


@pytest.mark.parametrize(
    ("latent", "text", "is_same_environment", "expected"),
    [
        (same, same, True, ["equal", "equal"]),
        (same, same, False, ["equal", "equal"]),
        (noisy, same, False, ["close", "equal"]),
        (noisy, same, True, ["differ", "equal"]),
        (broken, same, False, ["differ", "equal"]),
        (same, noisy, False, ["equal", "close"]),
        (same, noisy, True, ["equal", "differ"]),
        (same, broken, False, ["equal", "differ"]),
    ],
)
def test_each_sample_gets_its_verdict(
    tmp_path: Path,
    encoders: Encoders,
    task: ShardTask,
    latent: Change,
    text: Change,
    is_same_environment: bool,
    expected: list[str],
) -> None:
    environment = encoders.environment() | ({} if is_same_environment else {"torch": "1.0"})
    cache = encoded(tmp_path, encoders, task, latent=latent, text=text, environment=environment)
    rows = cache.read_index().to_pylist()
    verdicts = list(encode_again(cache, rows, Originals(cache, None)))
    assert len(verdicts) == 5
    for verdict in verdicts:
        kind = expected[0] if verdict.line.startswith("latent of") else expected[1]
        assert verdict.kind == kind, verdict.line
        assert any(row["sample"] in verdict.line for row in rows)
        if kind == "close":
            assert "(other than recorded: torch 1.0, here" in verdict.line
        if kind == "differ":
            assert rows[0]["latent"]["shard"] in verdict.line


def test_clips_that_are_gone_are_said_so(tmp_path: Path, encoders: Encoders, task: ShardTask) -> None:
    cache = encoded(tmp_path / "cache", encoders, task, latent=same, text=same, environment={})
    verdicts = list(encode_again(cache, cache.read_index().to_pylist()[:1], Originals(cache, tmp_path)))
    assert verdicts[0].kind == "not compared"
    assert "no file" in verdicts[0].line


def test_other_models_are_refused_by_name(tmp_path: Path, encoders: Encoders) -> None:
    provenance = encoders.provenance()
    provenance["latent"]["weights_sha256"] = "0" * 64
    cache = Cache.open_or_create(tmp_path, provenance)
    with pytest.raises(InputError, match="weights_sha256"):
        list(encode_again(cache, [], Originals(cache, None)))


def test_tolerances_grow_with_what_codecs_round() -> None:
    codecs = [Codec.parse(text) for text in ("float32", "bfloat16+zstd", "int8@37+delta+zstd", "int8@30+zstd")]
    latents = [latent_tolerance("float32", codec) for codec in codecs]
    assert latents == sorted(latents)
    assert latents[0] < latent_tolerance("bfloat16", codecs[0])
    assert 1 > text_tolerance("float32", codecs[0]) > text_tolerance("float32", codecs[-1]) > 0.99
