"""Columns built a row group at a time: the same as from all rows in one table."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache import live
from shared.cache.compact import compact
from shared.cache.dataset import Cache
from shared.cache.removal import remove_samples
from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import provenance, write_cache
from train.index_columns import Spool
from train.sample_index import SampleIndex, Selection

SIZES = {Bucket(3, 32, 48): 9, Bucket(2, 32, 32): 17}


@pytest.fixture(autouse=True)
def index_in_the_tests_own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def cache(tmp_path) -> Cache:
    """Samples in a snapshot and beside it, some with newer texts of other lengths, some removed."""
    root, settings = tmp_path / "c", {"captions_per_sample": 3, "samples_per_shard": 5}
    write_cache(root, SIZES, **settings, manifest={"score": [1.0, 2.5, None]})
    compact(Cache.open(root), 1 << 30)
    write_cache(root, {Bucket(2, 32, 32): 11}, **settings, seed=1, manifest={"score": ["2.5", "none"]})
    cache = write_cache(root, SIZES, captions_per_sample=2, seed=2, new_texts=True, samples_per_shard=4)
    remove_samples(cache, cache.read_index([])["sample"].to_pylist()[4:40:6])
    return cache


def expected_rows(cache: Cache) -> list[dict]:
    """Returns the rows in storage order."""
    rows = cache.read_index().to_pylist()
    return sorted(
        rows,
        key=lambda row: (
            *(row["num_frames"], row["height"], row["width"]),
            *(row["latent"]["shard"], row["latent"]["offset"]),
        ),
    )


def places(index: SampleIndex, stream: str) -> list[tuple]:
    columns = getattr(index.folder.columns(), stream)
    return [
        (index.shards[shard], offset, size, crc32c, index.codecs[codec])
        for shard, offset, size, crc32c, codec in zip(
            *(getattr(columns, name).tolist() for name in ("shard", "offset", "num_bytes", "crc32c", "codec")),
            strict=True,
        )
    ]


def place(entry: dict) -> tuple:
    return tuple(entry[name] for name in ("shard", "offset", "bytes", "crc32c", "codec"))


@pytest.mark.parametrize("batch_rows", [1, 7, 1 << 16])
def test_columns_are_those_of_all_rows_in_one_sorted_table(cache, batch_rows, monkeypatch):
    monkeypatch.setattr(live, "_BATCH_ROWS", batch_rows)
    index, rows = SampleIndex.open(cache), expected_rows(cache)
    columns = index.folder.columns()
    captions = [row["text.t5"]["captions"] for row in rows]
    assert len(rows) == index.num_samples == 2 * sum(SIZES.values()) + 11 - 6
    assert {len(entries) for entries in captions} == {2, 3}
    assert [f"{a:016x}{b:016x}" for a, b in columns.identity.tolist()] == [row["sample"] for row in rows]
    assert places(index, "latent") == [place(row["latent"]) for row in rows]
    assert np.diff(columns.caption_start).tolist() == [len(entries) for entries in captions]
    assert places(index, "caption") == [place(entry) for entries in captions for entry in entries]
    assert columns.num_tokens.tolist() == [entry["num_tokens"] for entries in captions for entry in entries]
    assert {path.suffix for path in index.folder.path.iterdir()} == {".npy", ".json"}


@pytest.mark.parametrize("batch_rows", [1, 1 << 16])
def test_a_column_of_numbers_and_texts_is_text_in_every_row_group(cache, batch_rows, monkeypatch):
    monkeypatch.setattr(live, "_BATCH_ROWS", batch_rows)
    index = SampleIndex.open(cache, Selection(where="score == '2.5'"))
    rows = [row for row in expected_rows(cache) if str(row["manifest"] and row["manifest"]["score"]) == "2.5"]
    assert len({row["latent"]["shard"] for row in rows}) > 3
    identities = index.folder.columns().identity.tolist()
    assert [f"{a:016x}{b:016x}" for a, b in identities] == [row["sample"] for row in rows]


def test_samples_without_texts_are_counted_and_one_is_named(tmp_path):
    root = tmp_path / "c"
    write_cache(root, {Bucket(2, 32, 32): 3})
    fragment = next((root / "index").iterdir())
    table = pq.read_table(fragment)
    texts = table["text.t5"].take(pa.array([0, None, 2]))
    changed = table.set_column(table.column_names.index("text.t5"), "text.t5", texts)
    pq.write_table(changed, fragment)
    named = table["sample"][1].as_py()
    with pytest.raises(InputError, match=f"nothing for 1 sample in stream 'text.t5', sample {named} among them"):
        SampleIndex.open(Cache.open(root))
    assert not any(path.name.startswith(".tmp") for path in (tmp_path).rglob("*"))


def test_more_channels_than_the_provenance_says_are_refused(tmp_path):
    cache = write_cache(tmp_path / "c", {Bucket(2, 32, 32): 3})
    cache.provenance["text.t5"] = provenance()["text.t5"] | {"text_channels": 8}
    with pytest.raises(InputError, match=r"caption embeddings of \[16\] channels, but text_channels=8"):
        SampleIndex.open(cache)


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    with Spool(tmp_path / "missing") as spool, pytest.raises(InputError, match="name another folder: --local-cache"):
        spool.append("offset", np.arange(3))


def test_a_spool_returns_what_was_appended_and_leaves_no_file(tmp_path):
    with Spool(tmp_path) as spool:
        spool.append("offset", np.arange(3))
        spool.append("offset", np.arange(5)[::2])
        assert spool.take("offset").tolist() == [0, 1, 2, 0, 2, 4]
    assert not list(tmp_path.iterdir())
