"""Choosing samples: by a condition on their columns, and by a hash of their source."""

import pyarrow as pa
import pytest

from shared.errors import InputError
from shared.spec import Bucket
from tests.train.synthetic_cache import write_cache
from train.sample_index import SampleIndex, Selection
from train.where import Where, held_out, parse_fraction

TABLE = pa.table(
    {
        "sample": ["a", "b", "c", "d"],
        "fps": [8.0, 24.0, 30.0, 60.0],
        "num_frames": pa.array([1, 16, 16, 32], pa.int32()),
        "manifest": [
            {"aesthetic": 4.5, "source": "mine", "kind": "film", "a-b": 1, "ok": True},
            {"aesthetic": 5.5, "source": "mine", "kind": "game", "a-b": 2, "ok": False},
            {"aesthetic": None, "source": "mine", "kind": None, "a-b": 3, "ok": True},
            {"aesthetic": 7.0, "source": "mine", "kind": "film", "a-b": 4, "ok": None},
        ],
    }
)


def chosen(text: str) -> str:
    mask = Where(text).select(TABLE, lambda: ["fps", "aesthetic"])
    assert mask.null_count == 0
    return "".join(TABLE.filter(mask)["sample"].to_pylist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aesthetic > 5", "bd"),
        ("aesthetic > 5 and fps >= 24", "bd"),
        ("aesthetic > 5 or fps == 30", "bcd"),
        ("not aesthetic > 5", "a"),
        ("aesthetic is None", "c"),
        ("aesthetic is not None and kind == 'film'", "ad"),
        ("kind in ('game', \"other\")", "b"),
        ("kind not in ['game']", "ad"),
        ("num_frames in (1, 32)", "ad"),
        ("fps in (24, 60)", "bd"),
        ("10 < fps <= 30", "bc"),
        ("fps * 2 - 8 > num_frames + 30", "cd"),
        ("num_frames / 3 > 10", "d"),
        ("num_frames > -(2 - 18)", "d"),
        ("fps > 48 / 2", "cd"),
        ("manifest['a-b'] != 2", "acd"),
        ("manifest['source'] == 'mine'", "abcd"),
        ("ok", "ac"),
        ("not ok", "b"),
        ("sample == 'b'", "b"),
    ],
)
def test_a_condition_chooses_the_rows_that_fulfil_it(text, expected):
    assert chosen(text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("aestetic > 5", r"no column 'aestetic': the cache has fps, aesthetic"),
        ("aesthetic >", "not an expression"),
        ("__import__('os').system('true')", "is not allowed"),
        ("fps.real > 3", "'fps.real' is not allowed"),
        ("fps", "it is a value, not a condition"),
        ("fps > 'high'", "expected comparisons"),
        ("kind > 3", "expected comparisons"),
        ("kind in manifest", "give a list"),
        ("fps in (fps, 3)", "holds other things than values"),
        ("aesthetic == None", "write 'is None'"),
        ("aesthetic is 3", "only 'is None'"),
        ("[x for x in fps]", "is not allowed"),
        ("fps if ok else 3", "is not allowed"),
        ("2 ** fps > 3", "is not allowed"),
        ("1 / 0 > fps", "division by zero"),
        ("", "not an expression"),
    ],
)
def test_what_is_no_condition_is_one_line(text, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        chosen(text)
    assert "\n" not in str(caught.value)


def test_a_name_of_a_window_column_is_the_manifests_where_the_index_has_none_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = Bucket(2, 32, 32)
    cache = write_cache(tmp_path / "old", {bucket: 6}, manifest={"window": [1.0, 2.0]})
    assert SampleIndex.open(cache, Selection(where="window > 1")).num_samples == 3
    cache = write_cache(tmp_path / "new", {bucket: 6}, manifest={"window": [9.0]}, views=[[(0, False)]])
    with pytest.raises(InputError, match="no sample fulfils --where 'window > 1'"):
        SampleIndex.open(cache, Selection(where="window > 1"))
    assert SampleIndex.open(cache, Selection(where="window < 1 and manifest['window'] > 1")).num_samples == 6
    with pytest.raises(InputError, match="no column 'flip': the cache has .*, fps, window"):
        SampleIndex.open(
            write_cache(tmp_path / "old", {bucket: 1}, manifest={"window": [3.0]}, seed=1), Selection(where="flip")
        )


def test_a_condition_on_the_manifest_selects_samples_of_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scores = [4.0, 5.5, 6.0, None]
    cache = write_cache(tmp_path / "c", {Bucket(2, 32, 32): 8}, manifest={"aesthetic": scores, "flow": [1.0]})
    index = SampleIndex.open(cache, Selection(where="aesthetic > 5 and fps == 8"))
    identities = {f"{a:016x}{b:016x}" for a, b in index.folder.columns().identity.tolist()}
    rows = cache.read_index().to_pylist()
    assert identities == {row["sample"] for row in rows if (row["manifest"]["aesthetic"] or 0) > 5}
    assert len(identities) == 4
    with pytest.raises(InputError, match=r"no column 'aestetic': the cache has sample, source, .*aesthetic, flow"):
        SampleIndex.open(cache, Selection(where="aestetic > 5"))
    with pytest.raises(InputError, match="no sample fulfils --where 'aesthetic > 50': ask for less"):
        SampleIndex.open(cache, Selection(where="aesthetic > 50"))


def test_a_condition_may_name_columns_that_only_some_shards_have(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_cache(tmp_path / "c", {Bucket(2, 32, 32): 3})
    cache = write_cache(tmp_path / "c", {Bucket(2, 32, 32): 3}, manifest={"aesthetic": [9.0, 1.0, 9.0]}, seed=1)
    assert SampleIndex.open(cache, Selection(where="aesthetic > 5")).num_samples == 2


def test_all_samples_of_a_source_are_on_one_side_and_the_sides_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = write_cache(tmp_path / "c", {Bucket(1, 16, 16): 120}, clips_per_source=3)
    sources = {row["sample"]: row["source"] for row in cache.read_index().to_pylist()}
    sides = []
    for held_out_side in (False, True):
        index = SampleIndex.open(cache, Selection(holdout="25%", held_out_side=held_out_side))
        sides.append([f"{a:016x}{b:016x}" for a, b in index.folder.columns().identity.tolist()])
    assert sorted(sides[0] + sides[1]) == sorted(sources)
    assert not {sources[s] for s in sides[0]} & {sources[s] for s in sides[1]}
    assert 0.1 < len(sides[1]) / 120 < 0.4


def test_a_hash_holds_out_the_asked_part_whatever_the_sources_are_called():
    names = [f"videos/{i:08d}.mp4" for i in range(20_000)] + [""]
    column = pa.chunked_array([names[:7], names[7:]])
    mask = held_out(column, 0.01)
    assert mask.mean() == pytest.approx(0.01, abs=0.003)
    assert held_out(pa.chunked_array([names]), 0.01).tolist() == mask.tolist()
    assert held_out(pa.chunked_array([names[5:9]]), 0.5).tolist() == held_out(column, 0.5)[5:9].tolist()
    alike = ["ab", "ba", "aab", "aba", "abab", "b", "a"]
    assert 0 < held_out(pa.chunked_array([alike * 3]), 0.5)[:7].sum() < 7


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("12.5%", 0.125)])
def test_a_part_is_written_in_percent_or_as_a_fraction(text, value):
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["0", "1", "100%", "-1%", "one", "nan"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="expected a part of the samples between 0 and 1"):
        parse_fraction(text)
