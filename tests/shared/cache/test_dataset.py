"""Opening a cache, and what is refused."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shared.cache.card import card, write_card
from shared.cache.commit import ShardWriter
from shared.cache.committed import CommittedSamples, read_committed
from shared.cache.compact import compact
from shared.cache.dataset import Cache, check_is_cache_or_empty
from shared.cache.ledger import Refusal, write_ledger
from shared.cache.null_caption import read_null_caption, write_null_caption
from shared.cache.rows import sample_row
from shared.codec import Codec
from shared.errors import InputError
from shared.stores.open import open_store
from tests.shared.cache.conftest import BUCKET, PROVENANCE, ShardMaker, make_sample


def sources_of(committed: CommittedSamples) -> Iterator[tuple[int, str]]:
    """Yields the row and the source of each sample."""
    for rows, table in committed.clips(np.arange(len(committed))):
        yield from zip(rows.tolist(), table["source"].to_pylist(), strict=True)


def test_a_cache_opens_again_with_what_it_was_made_with(cache: Cache) -> None:
    assert Cache.open(cache.url).provenance == PROVENANCE
    committed = read_committed(Cache.open_or_create(cache.url, PROVENANCE), "text.t5")
    assert set(committed.samples()) == {f"{n:032x}" for n in range(4)}
    assert committed.removed.by_sample() == {}
    sources = {committed.samples()[row]: name for row, name in sources_of(committed)}
    assert sources[f"{3:032x}"] == "clips/näht 3.mp4"


@pytest.mark.parametrize(
    ("stream", "key", "value"),
    [
        ("latent", "weights_sha256", "33"),
        ("latent", "scaling_factor", 0.6),
        ("latent", "codec", "int8@37+zstd"),
        ("latent", "posterior", "mean"),
        ("text.t5", "max_tokens", 77),
    ],
)
def test_a_job_with_other_models_or_settings_is_refused_by_name_and_value(
    cache: Cache, stream: str, key: str, value: object
) -> None:
    other = copy.deepcopy(PROVENANCE)
    other[stream][key] = value
    with pytest.raises(InputError) as refused:
        Cache.open_or_create(cache.url, other)
    text = str(refused.value)
    assert f"{key}={PROVENANCE[stream].get(key)!r}" in text
    assert f"{key}={value!r}" in text
    assert "another --output" in text


def test_all_that_differs_is_named_and_what_is_not_known_does_not_count(cache: Cache) -> None:
    other = copy.deepcopy(PROVENANCE)
    other["latent"] |= {"posterior": "mean", "weights_sha256": "33"}
    other["text.t5"] |= {"max_tokens": 77}
    with pytest.raises(
        InputError, match=r"posterior='mean', weights_sha256='33'.*; its stream 'text\.t5'.* max_tokens=77"
    ):
        cache.require(other)
    known = {"latent": {"posterior": "mean"}, "text.clip": {"max_tokens": 77}}
    with pytest.raises(InputError, match=r"posterior='mean' \(model None\): use the cache's own"):
        cache.require_settings(known)
    cache.require_settings({"latent": {"posterior": PROVENANCE["latent"].get("posterior")}, "text.t5": {}})


def test_where_the_weights_were_found_does_not_matter(cache: Cache) -> None:
    moved = copy.deepcopy(PROVENANCE)
    moved["latent"]["model"] = "elsewhere/a"
    Cache.open_or_create(cache.url, moved)


def test_a_stream_of_texts_can_be_added_and_is_then_as_fixed_as_the_others(cache: Cache) -> None:
    added = {"text.clip": {"weights_sha256": "44", "text_channels": 6}}
    assert Cache.open_or_create(cache.url, added).provenance == {**PROVENANCE, **added}
    assert Cache.open(cache.url).provenance == {**PROVENANCE, **added}
    with pytest.raises(InputError, match="text_channels=6.*text_channels=7"):
        Cache.open_or_create(cache.url, {"text.clip": {"weights_sha256": "44", "text_channels": 7}})


def test_a_stream_of_latents_cannot_be_added(cache: Cache) -> None:
    with pytest.raises(InputError, match="found no stream 'depth'"):
        Cache.open_or_create(cache.url, {"depth": {}})


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"found 'thesis.tex' but no dataset.json"):
        Cache.open_or_create(tmp_path, PROVENANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_many_jobs_that_make_one_cache_at_once_all_open_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            url = tmp_path / f"cache {number}"
            caches = list(pool.map(lambda _, url=url: Cache.open_or_create(url, PROVENANCE), range(8)))
            assert all(cache.provenance == PROVENANCE for cache in caches)


def test_a_file_in_the_place_of_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="found a file: expected a folder"):
        check_is_cache_or_empty(open_store(tmp_path / "cache"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other", "version": 1, "streams": {}}', '{"version": 1}']
)
def test_a_dataset_json_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match="not the description of a cache"):
        Cache.open(tmp_path)


@pytest.mark.parametrize(("stream", "name"), [("latent", "latent_channels"), ("text.t5", "text_channels")])
def test_a_stream_of_no_known_width_is_refused(cache: Cache, stream: str, name: str) -> None:
    file = Path(cache.url) / "dataset.json"
    for width in (None, "16", 0):
        content = json.loads(file.read_text())
        content["streams"][stream][name] = width
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"dataset.json: .*stream {stream}: {name} is {width}, expected a whole"):
            Cache.open(cache.url)


def test_a_later_format_version_is_refused(cache: Cache) -> None:
    file = Path(cache.url) / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 3}))
    with pytest.raises(InputError, match="format version 3: this code reads 1 and 2"):
        Cache.open(cache.url)


def test_a_cache_of_version_1_is_read_and_not_extended() -> None:
    cache = Cache.open(Path(__file__).parents[2] / "data" / "cache_v1")
    assert len(cache.read_index()) == 12
    with pytest.raises(InputError, match="format version 1 is read and not extended.*convert"):
        Cache.open_or_create(cache.url, cache.provenance)


@pytest.mark.parametrize("place", ["none", "empty", "file"])
def test_an_absent_cache_is_refused_in_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"found no dataset.json: expected the folder or URL of a cache"):
        Cache.open(tmp_path / place)


def test_of_two_rows_of_one_sample_the_first_fragment_counts(cache: Cache, write_shard: ShardMaker) -> None:
    write_shard(cache.url, [3, 4], shard_id="c" * 32)
    index = cache.read_index()
    assert index["sample"].to_pylist() == [f"{n:032x}" for n in range(5)]
    assert f"/{'b' * 32}-" in index["latent"][3].as_py()["shard"]


def test_an_empty_cache_has_an_empty_index(tmp_path: Path) -> None:
    assert len(Cache.open_or_create(tmp_path, PROVENANCE).read_index()) == 0


def test_only_the_columns_asked_for_are_read(cache: Cache) -> None:
    table = cache.read_index(columns=["fps", "latent.offset", "manifest.camera"])
    assert set(table.column_names) == {"sample", "fps", "latent", "text.t5", "manifest"}
    assert table["latent"][0].as_py().keys() == {"generation", "offset"}
    assert table["manifest"].to_pylist() == [{"camera": "still"}] * 4


def test_a_column_of_the_manifest_that_changes_its_type_is_text(cache: Cache) -> None:
    sample = dataclasses.replace(make_sample(7), manifest={"aesthetic": "good", "camera": None, "flow": 1.0})
    codecs = {stream: Codec.parse("bfloat16") for stream in PROVENANCE}
    with ShardWriter(cache.store, shard_id="c" * 32, folder=str(BUCKET), container="tar", record={}) as writer:
        writer.add(*sample_row(sample, codecs, 0))
        writer.commit()
    expected = [
        *({"aesthetic": f"{number / 2:g}", "camera": "still", "flow": None} for number in range(4)),
        {"aesthetic": "good", "camera": None, "flow": 1.0},
    ]
    assert cache.read_index(columns=["manifest"])["manifest"].to_pylist() == expected
    compact(cache, 10**9)
    assert Cache.open(cache.url).read_index()["manifest"].to_pylist() == expected


@pytest.mark.parametrize("damage", ["other columns", "another version", "cut", "empty"])
def test_a_fragment_that_is_none_is_refused_by_its_name(cache: Cache, damage: str) -> None:
    file = Path(cache.url) / "index" / "0.parquet"
    if damage == "other columns":
        pq.write_table(pa.table({"x": ["x"]}).replace_schema_metadata({"format_version": "2"}), file)
    elif damage == "another version":
        pq.write_table(pa.table({"sample": ["x"]}), file)
    else:
        whole = (Path(cache.url) / "index" / f"{'a' * 32}.parquet").read_bytes()
        file.write_bytes(whole[:1000] if damage == "cut" else b"")
    with pytest.raises(InputError, match=r"index/0.parquet: not readable"):
        cache.read_index()


def test_the_same_refusals_are_in_the_ledger_once(cache: Cache) -> None:
    refusals = [Refusal(source="a", reason="empty", detail="0 bytes"), Refusal(source="b", reason="missing", detail="")]
    for _ in range(2):
        write_ledger(cache.store, refusals)
    write_ledger(cache.store, refusals[:1])
    assert sorted(cache.read_ledger()["source"].to_pylist()) == ["a", "b"]


def test_the_null_caption_is_stored_once(cache: Cache) -> None:
    assert read_null_caption(cache.store, "text.t5") is None
    first, second = torch.ones(1, 8), torch.zeros(1, 8)
    write_null_caption(cache.store, "text.t5", first)
    write_null_caption(cache.store, "text.t5", second)
    found = read_null_caption(cache.store, "text.t5")
    assert found is not None
    assert torch.equal(found, first)


def test_the_card_says_what_the_cache_holds_and_is_left_alone_while_it_is_true(
    cache: Cache, write_shard: ShardMaker
) -> None:
    write_card(cache)
    file = Path(cache.url) / "README.md"
    text, written = file.read_text(), file.stat().st_mtime_ns
    assert "4 samples of 4 clips" in text
    assert "| 2x16x24 | 4 | 96 | 2.00 | 4.0 | 128 |" in text
    assert "| weights_sha256 | `22` |" in text
    write_card(cache)
    assert file.stat().st_mtime_ns == written
    write_shard(cache.url, [8], shard_id="c" * 32)
    assert "5 samples" in card(cache)
