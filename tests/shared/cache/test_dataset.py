"""Opening a cache, and what is refused."""

import copy
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.dataset import Cache, check_is_cache_or_empty
from shared.cache.ledger import Refusal, write_ledger
from shared.errors import InputError
from tests.shared.cache.conftest import PROVENANCE, ShardMaker


def test_a_cache_opens_again_with_what_it_was_made_with(cache: Cache) -> None:
    assert Cache.open(cache.root).provenance == PROVENANCE
    assert Cache.open_or_create(cache.root, PROVENANCE).committed_samples().keys() == {f"{n:032x}" for n in range(4)}


@pytest.mark.parametrize(
    ("stream", "key", "value"),
    [("latent", "weights_sha256", "33"), ("latent", "scaling_factor", 0.6), ("text.t5", "max_tokens", 77)],
)
def test_a_job_with_other_models_or_settings_is_refused_by_name_and_value(
    cache: Cache, stream: str, key: str, value: object
) -> None:
    other = copy.deepcopy(PROVENANCE)
    other[stream][key] = value
    with pytest.raises(InputError) as refused:
        Cache.open_or_create(cache.root, other)
    text = str(refused.value)
    assert f"{key}={PROVENANCE[stream][key]!r}" in text
    assert f"{key}={value!r}" in text
    assert "another --output" in text


def test_where_the_weights_were_found_does_not_matter(cache: Cache) -> None:
    moved = copy.deepcopy(PROVENANCE)
    moved["latent"]["model"] = "elsewhere/a"
    Cache.open_or_create(cache.root, moved)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"found 'thesis.tex' but no dataset.json"):
        Cache.open_or_create(tmp_path, PROVENANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match="found a file: expected a folder"):
        check_is_cache_or_empty(tmp_path / "cache")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other", "version": 1, "streams": {}}', '{"version": 1}']
)
def test_a_dataset_json_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match="not the description of a cache"):
        Cache.open(tmp_path)


def test_a_later_format_version_is_refused(cache: Cache) -> None:
    file = cache.root / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(InputError, match="format version 2: this code reads 1"):
        Cache.open(cache.root)


def test_an_absent_cache_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such folder without dataset.json"):
        Cache.open(tmp_path / "none")


def test_of_two_rows_of_one_sample_the_first_fragment_counts(cache: Cache, write_shard: ShardMaker) -> None:
    write_shard(cache.root, [3, 4], shard_id="c" * 32)
    index = cache.read_index()
    assert index["sample"].to_pylist() == [f"{n:032x}" for n in range(5)]
    assert f"/{'b' * 32}-" in index["latent"][3].as_py()["shard"]


def test_an_empty_cache_has_an_empty_index(tmp_path: Path) -> None:
    assert len(Cache.open_or_create(tmp_path, PROVENANCE).read_index()) == 0


def test_a_fragment_with_other_columns_is_refused(cache: Cache) -> None:
    pq.write_table(pa.table({"sample": ["x"]}), cache.root / "index" / "0.parquet")
    with pytest.raises(InputError, match="expected .*source"):
        cache.read_index()


def test_the_same_refusals_are_in_the_ledger_once(cache: Cache) -> None:
    refusals = [Refusal(source="a", reason="empty", detail="0 bytes"), Refusal(source="b", reason="missing", detail="")]
    for _ in range(2):
        write_ledger(cache.root, refusals)
    write_ledger(cache.root, refusals[:1])
    assert sorted(cache.read_ledger()["source"].to_pylist()) == ["a", "b"]
