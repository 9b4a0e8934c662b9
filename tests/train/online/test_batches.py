"""Batches that are encoded online: those of the cache that stage 1 makes of the same manifest."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from preprocess.config import PreprocessConfig
from shared.cache.dataset import Cache
from shared.cache.ledger import Refusal
from shared.errors import InputError
from tests.train.online.encoded_cache import encode_cache
from train.chosen_rows import Selection
from train.config.online import OnlineOptions
from train.data import Batch
from train.loader import load_batches
from train.online.batches import OnlineJob, _padded, online_batches
from train.online.encoders import OnlineEncoders
from train.online.encoding import OnlineEncoding
from train.online.index import OnlineIndex, open_probes, probe_manifest, read_clips
from train.online.ledger import OnlineLedger
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.sample_index import IndexedSamples, SampleIndex

BUCKETS = ("4x64x64", "8x48x32")
ENCODED = {"windows_per_clip": 3, "flip": True, "frame_interval": 2, "shard_samples": 3, "max_tokens": 20}
STEPS = 12  # five epochs of the larger bucket
RUN_BYTES = 20_000  # a few samples

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def index_in_the_tests_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def manifest(clips_folder: Path) -> Path:
    return clips_folder / "clips.csv"


def make_cache(manifest: Path, folder: Path, codec: str) -> Cache:
    config = PreprocessConfig(
        preset="demo",
        manifest=str(manifest),
        output=str(folder / "cache"),
        buckets=BUCKETS,
        latent_codec=codec,
        text_codec=codec,
        **ENCODED,
    )
    return encode_cache(config, folder / "probes")


@pytest.fixture(scope="module")
def cache(manifest, tmp_path_factory) -> Cache:
    return make_cache(manifest, tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A run's folder, where probes are kept."""
    return tmp_path_factory.mktemp("run")


def encoding_of(manifest: Path, codec: str = "float32", **changes) -> OnlineEncoding:
    options = OnlineOptions(
        online=str(manifest),
        vae="demo:vae",
        text_encoder="demo:t5",
        latent_codec=codec,
        text_codec=codec,
        **(ENCODED | changes),
    )
    return OnlineEncoding.of(options, BUCKETS)


def open_online(encoding: OnlineEncoding, output: Path, selection: Selection | None = None) -> OnlineIndex:
    assert probe_manifest(encoding, output, num_workers=2) == []
    return OnlineIndex.open(
        encoding,
        OnlineEncoders(encoding, CPU),
        read_clips(encoding),
        open_probes(encoding, output),
        selection or Selection(),
        run_bytes=RUN_BYTES,
    )


def plan_of(index: IndexedSamples, batch_size: int = 4) -> BatchPlan:
    return BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, batch_size), seed=3)


def online(index: OnlineIndex, folder: Path, *, first=0, steps=STEPS, **settings) -> list[Batch]:
    settings = {"rank": 0, "world_size": 1} | settings
    settings["ledger"] = folder / f"refused-{settings['rank']}.jsonl"
    job = OnlineJob(index=index, plan=plan_of(index), seed=3, caption_dropout=0.3, **settings)
    return list(online_batches(job, range(first, steps)))


def cached(cache: Cache, selection: Selection | None = None, *, steps=STEPS) -> list[Batch]:
    index = SampleIndex.open(cache, selection, run_bytes=RUN_BYTES)
    job = LoaderJob.of_index(index, plan_of(index), rank=0, world_size=1, seed=3, caption_dropout=0.3)
    return list(load_batches(job, range(steps), num_workers=0, pin_memory=False))


def assert_same(found: Batch, expected: Batch, *, latents=0.0, captions=1e-5) -> None:
    assert found.samples == expected.samples
    for name in ("u", "noise_keys", "mask", "drop_caption", "fps", "height", "width"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.moments, found.latents.dtype) == (expected.moments, expected.latents.dtype)
    torch.testing.assert_close(found.latents, expected.latents, atol=latents, rtol=0.0)
    torch.testing.assert_close(found.captions, expected.captions, atol=captions, rtol=captions)


@pytest.fixture(scope="module")
def index(manifest, output, tmp_path_factory) -> OnlineIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("index")))
        return open_online(encoding_of(manifest), output)


def test_batches_are_those_of_the_cache_over_several_epochs_windows_and_buckets(cache, index, output):
    assert {str(bucket): rows.num_samples for bucket, rows in index.buckets.items()} == {"4x64x64": 5, "8x48x32": 1}
    expected = cached(cache)
    for found, same in zip(online(index, output), expected, strict=True):
        assert_same(found, same)
    names = {sample for batch in expected for sample in batch.samples}
    assert len(names) > 20
    wanted = {row["sample"]: row["source"] for row in cache.read_index().to_pylist() if row["sample"] in names}
    assert index.sources(sorted(names)) == wanted
    assert index.sources(["0" * 32]) == {}


def test_what_a_codec_loses_is_lost_online_too(manifest, output, tmp_path):
    codec = "int8@30+zstd"
    expected = cached(make_cache(manifest, tmp_path, codec), steps=4)
    index = open_online(encoding_of(manifest, codec), output)
    for found, same in zip(online(index, output, steps=4), expected, strict=True):
        assert_same(found, same, captions=0.02)  # a last bit of T5 may round the other way


def test_the_slow_form_of_t5_gives_the_same_captions(index, manifest):
    tokens = [index.columns.tokens(number) for number in (0, 3, 0, 5)]
    slow = OnlineEncoders(encoding_of(manifest, faster_t5=False), CPU)
    assert (index.encoders.text.forward, slow.text.forward) == ("torch", "padded")
    for found, expected in zip(slow.encode_captions(tokens), index.encoders.encode_captions(tokens), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_ranks_together_and_a_run_that_goes_on_have_the_batches_of_one_rank(index, output):
    whole = online(index, output, steps=6)
    for rank in range(2):
        for found, expected in zip(
            online(index, output, first=3, steps=6, rank=rank, world_size=2), whole[3:], strict=True
        ):
            mine = slice(2 * rank, 2 * rank + 2)
            assert found.samples == expected.samples[mine]
            assert torch.equal(found.latents, expected.latents[mine])
            assert torch.equal(found.mask, expected.mask[mine])
            torch.testing.assert_close(found.captions, expected.captions[mine], atol=1e-5, rtol=1e-5)


def test_the_whole_posterior_is_sampled_anew_each_epoch(manifest, output):
    index = open_online(encoding_of(manifest, posterior="mean+logvar", windows_per_clip=1, flip=False), output)
    batches = online(index, output, steps=4)
    assert all(batch.moments and batch.latents.shape[1] == 2 * index.geometry.latent_channels for batch in batches)


def test_a_condition_and_a_holdout_choose_the_samples_that_they_choose_of_a_cache(cache, manifest, output):
    for selection in (
        Selection(where="height == 64 and (window is None or not flip)", holdout="40%"),
        Selection(holdout="40%", held_out_side=True),
    ):
        index = open_online(encoding_of(manifest), output, selection)
        expected = cached(cache, selection, steps=3)
        assert [batch.samples for batch in online(index, output, steps=3)] == [batch.samples for batch in expected]
    with pytest.raises(InputError, match=r"no column 'aesthetic': the cache has sample, source"):
        open_online(encoding_of(manifest), output, Selection(where="aesthetic > 5"))


def test_random_windows_are_fresh_each_epoch_and_the_same_again(manifest, output):
    index = open_online(encoding_of(manifest, windows_per_clip=1, flip=False, online_windows="random"), output)
    first, again = (online(index, output, windows="random", steps=7) for _ in range(2))
    latents: dict[str, list[torch.Tensor]] = {}
    for found, same in zip(first, again, strict=True):
        assert torch.equal(found.latents, same.latents)
        for sample, latent in zip(found.samples, found.latents, strict=True):
            latents.setdefault(sample, []).append(latent)
    seen = [len({tuple(latent.flatten().tolist()) for latent in some}) for some in latents.values()]
    assert sum(seen) > 0.8 * sum(map(len, latents.values()))


def test_counting_caption_tokens_waits_for_no_device():
    texts = [torch.empty(length, 4, device="meta") for length in (3, 1)]
    captions, mask = _padded(texts, 5)
    assert (captions.shape, captions.device.type) == ((2, 5, 4), "meta")
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


@pytest.fixture
def broken(clips_folder, tmp_path) -> tuple[Path, OnlineIndex]:
    """A manifest one of whose clips is cut short after it was probed, and its index."""
    for path in clips_folder.iterdir():
        shutil.copy(path, tmp_path)
    encoding = encoding_of(tmp_path / "clips.csv", windows_per_clip=1, flip=False)
    index = open_online(encoding, tmp_path / "run")
    clip = tmp_path / "towers_teal.mp4"
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    return tmp_path, index


def test_a_clip_that_cannot_be_decoded_ends_the_run_or_is_replaced_alike_on_any_number_of_ranks(broken):
    folder, index = broken
    with pytest.raises(InputError, match=r"towers_teal.mp4: .*: mend it, take it out of the manifest, or use --on-"):
        online(index, folder / "stops")
    whole = online(index, folder / "skips", on_corrupt="skip", steps=5)
    assert sum(batch.num_skipped for batch in whole) > 1
    (row,) = [json.loads(line) for line in (folder / "skips" / "refused-0.jsonl").read_text().splitlines()]
    assert (row["source"], row["reason"]) == ("towers_teal.mp4", "probe_outdated")
    names = {sample for batch in whole for sample in batch.samples}
    assert row["sample"] not in names
    assert len(names) == index.num_samples - 1
    for rank in range(2):
        for found, expected in zip(
            online(index, folder / "ranks", rank=rank, world_size=2, on_corrupt="skip", steps=5), whole, strict=True
        ):
            assert found.samples == expected.samples[2 * rank : 2 * rank + 2]
            assert torch.equal(found.latents, expected.latents[2 * rank : 2 * rank + 2])


def test_a_ledger_reads_what_a_killed_process_left_of_it_and_any_character(tmp_path):
    file = tmp_path / "refused.jsonl"
    refusal = Refusal(
        source="a\u2028b.mp4", source_version="1", bucket="8x48x48", sample="one", reason="corrupt", detail="bad \x85"
    )
    OnlineLedger(file).add(refusal)
    with file.open("a") as half:
        half.write('{"source": "c.mp4", "sam')
    again = OnlineLedger(file)
    assert "one" in again
    again.add(dataclasses.replace(refusal, sample="two"))
    assert all(name in OnlineLedger(file) for name in ("one", "two"))


def test_rows_and_clips_that_cannot_be_used_are_told_with_their_reasons(clips_folder, tmp_path):
    for name in ("towers_teal.mp4", "bird_portrait.mp4", "not_a_video.mp4"):
        shutil.copy(clips_folder / name, tmp_path)
    rows = [
        ("towers_teal.mp4", "Towers."),
        ("bird_portrait.mp4", "https://www.example.com/"),
        ("not_a_video.mp4", "Text."),
        ("", "Nothing."),
    ]
    with open(tmp_path / "clips.csv", "w") as file:
        csv.writer(file).writerows([("path", "text"), *rows])
    index = open_online(encoding_of(tmp_path / "clips.csv"), tmp_path / "run")
    reasons = {json.loads(line)["source"]: json.loads(line)["reason"] for line in index.refusals().splitlines()}
    assert reasons["not_a_video.mp4"] == "not_a_video"
    assert reasons["bird_portrait.mp4"] == "no_caption_left"
    assert index.num_samples == 1
    assert sum(index.refused.values()) == 3
    (tmp_path / "clips.csv").write_text("path,text\nnot_a_video.mp4,Text.\n")
    with pytest.raises(InputError, match=r"no clip can be used \(1 not_a_video\): see --buckets"):
        open_online(encoding_of(tmp_path / "clips.csv"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"online": None}, "vae=demo:vae does nothing without --online"),
        ({"vae": None}, "--vae is missing"),
        ({"fps": 8.0, "frame_interval": 2}, "--fps with --frame-interval"),
        ({"online_windows": "random", "windows_per_clip": 2}, "windows_per_clip=2 does nothing with --online-windows"),
        ({"text_codec": "int8"}, "codec int8 does not say"),
        ({"vae_micro_batch": 0}, "vae_micro_batch=0: expected at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(changes, complaint):
    options = OnlineOptions(online="clips.csv", vae="demo:vae", text_encoder="demo:t5")
    with pytest.raises(InputError, match=complaint):
        dataclasses.replace(options, **changes)
