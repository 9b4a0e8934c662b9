"""Streams, containers and stores, through the job on Ray."""

import shutil
from pathlib import Path

import pytest

from shared.cache.dataset import Cache
from shared.cache.null_caption import read_null_caption
from shared.cache.reader import StreamReader
from tests.preprocess.conftest import Command, demo_options
from tests.preprocess.test_job import shards, table
from tests.s3 import S3Server


@pytest.fixture
def clips(clips_folder: Path, tmp_path: Path) -> Path:
    """A copy of the clips and their manifest, to be changed."""
    return shutil.copytree(clips_folder, tmp_path / "clips")


def edit(clips: Path, old: str, new: str) -> None:
    """Changes the manifest."""
    manifest = clips / "clips.csv"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))


def test_captions_and_clips_that_change_are_handled_one_by_one(
    demo_cache: Path, preprocess: Command, clips: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(demo_cache, tmp_path / "cache")
    before = {row["sample"]: row for row in Cache.open(root).read_index().to_pylist()}
    first_shards = shards(root)
    edit(clips, "A huge pink cumulus", "A giant pink cumulus")
    result = preprocess(*demo_options(clips, root))
    assert result.returncode == 0, result.stderr
    assert (table(result)["samples encoded"], table(result)["with new texts"]) == ("0", "2")
    after = {row["sample"]: row for row in Cache.open(root).read_index().to_pylist()}
    changed = [sample for sample in after if after[sample] != before[sample]]
    assert {after[sample]["source"] for sample in changed} == {"cloud_square.mkv"}
    for sample in changed:
        assert after[sample]["latent"] == before[sample]["latent"]
        (entry,) = after[sample]["text.t5"]["captions"]
        assert entry["caption"].startswith("A giant pink cumulus")
        assert entry["shard"].startswith("shards/text.t5/")
    assert first_shards.items() < shards(root).items()

    edit(clips, "\nmeadow.mpg", "\nnot_a_video.mp4")
    result = preprocess(*demo_options(clips, root))
    assert "2 samples in the cache of clips that changed or that the manifest does not name" in result.stderr
    assert len(Cache.open(root).read_index()) == 12
    result = preprocess(*demo_options(clips, root), "--prune")
    assert table(result)["samples removed"] == "2"
    assert "meadow.mpg" not in Cache.open(root).read_index()["source"].to_pylist()

    edit(clips, 'not_a_video.mp4,"An animated meadow', 'meadow.mpg,"An animated meadow')
    result = preprocess(*demo_options(clips, root))
    assert table(result)["samples encoded"] == "2"
    again = {row["sample"]: row for row in Cache.open(root).read_index().to_pylist()}
    assert again.keys() == before.keys()
    reader = StreamReader(Cache.open(root).store)
    for sample in (sample for sample in again if again[sample]["source"] == "meadow.mpg"):
        assert again[sample]["latent"]["generation"] == 1
        assert again[sample]["latent"]["crc32c"] == before[sample]["latent"]["crc32c"]
        assert reader.payload(again[sample]["latent"]) == reader.payload(before[sample]["latent"])


def test_a_second_text_encoder_adds_a_stream_and_leaves_the_rest(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(demo_cache, tmp_path / "cache")
    before = {row["sample"]: row for row in Cache.open(root).read_index().to_pylist()}
    options = ["--text-stream", "text.short", "--only-texts", "--max-tokens", 5, "--text-codec", "int8@30+zstd"]
    result = preprocess(*demo_options(clips_folder, root), *options)
    assert result.returncode == 0, result.stderr
    assert table(result)["with new texts"] == "12"
    cache = Cache.open(root)
    assert cache.provenance["text.short"]["max_tokens"] == 5
    null = read_null_caption(cache.store, "text.short")
    assert null is not None
    assert null.shape[0] == 1
    reader = StreamReader(cache.store)
    for row in cache.read_index().to_pylist():
        short = row.pop("text.short")
        assert row == before[row["sample"]]
        for entry in short["captions"]:
            assert reader.text(entry, short["channels"]).shape == (5, short["channels"])
    refused = preprocess(*demo_options(clips_folder, root), "--text-stream", "text.short", "--only-texts")
    assert refused.returncode == 2
    assert "made with codec='int8@30+zstd'" in refused.stderr


def test_shared_texts_posterior_and_small_codecs_in_zarr(
    demo_cache: Path, preprocess: Command, clips_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    small = ["--container", "zarr", "--latent-codec", "int8@37+delta+zstd", "--text-codec", "int8@30+zstd"]
    result = preprocess(*demo_options(clips_folder, root), *small, "--posterior", "mean+logvar", "--share-text")
    assert result.returncode == 0, result.stderr
    assert table(result)["shared texts encoded"] == "7"
    cache, reader = Cache.open(root), StreamReader(Cache.open(root).store)
    rows = cache.read_index().to_pylist()
    texts = {(entry["id"], entry["shard"], entry["offset"]) for row in rows for entry in row["text.t5"]["captions"]}
    assert len(rows) == 12
    assert len(texts) == 7
    samples = {row["sample"]: row for row in Cache.open(demo_cache).read_index().to_pylist()}
    assert samples.keys() == {row["sample"] for row in rows}
    plain = StreamReader(Cache.open(demo_cache).store)
    for row in rows:
        mean, logvar = reader.latent(row["latent"]).float().chunk(2)
        sample = plain.latent(samples[row["sample"]]["latent"]).float()
        assert mean.shape == sample.shape
        deviation = (sample - mean).std()
        assert (logvar / 2).exp().mean() / 2 < deviation < 0.1 * sample.std()
        for entry, other in zip(row["text.t5"]["captions"], samples[row["sample"]]["text.t5"]["captions"], strict=True):
            ours = reader.text(entry, row["text.t5"]["channels"]).float()
            theirs = plain.text(other, row["text.t5"]["channels"]).float()
            assert entry["caption"] == other["caption"]
            assert (ours - theirs).norm() / theirs.norm() < 0.05
    again = preprocess(*demo_options(clips_folder, root), *small, "--posterior", "mean+logvar", "--share-text")
    assert table(again)["samples encoded"] == "0"
    assert "shared texts encoded" not in table(again)


def test_a_cache_on_s3_holds_the_same_bytes_as_one_on_disk(
    demo_cache: Path, preprocess: Command, clips_folder: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/caches/demo"
    result = preprocess(*demo_options(clips_folder, Path("/unused"))[:5], url, *demo_options(clips_folder, Path())[6:])
    assert result.returncode == 0, result.stderr
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    cache = Cache.open(url)
    assert len(cache.read_index()) == 12
    found = {entry.path: cache.store.read(entry.path) for entry in cache.store.list("shards")}
    assert found == shards(demo_cache)
