"""JSON lines, mapped columns, several captions and parts of clips."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import InputError
from shared.media.clip import Clip, TimeRange
from shared.media.manifest import Manifest, parse_mapping, read_manifest
from shared.media.manifest.ranges import parse_list, parse_seconds


def written(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Writes rows in one of the formats; CSV gets lists as Python writes them."""
    path = folder / f"m.{kind}"
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        quoted = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
        path.write_text("\n".join(",".join(row) for row in [list(rows[0]), *quoted]) + "\n")
    return path


def said(manifest: Manifest) -> list[tuple[str, tuple[str, ...], TimeRange | None]]:
    return [(clip.source, clip.captions, clip.time_range) for clip in manifest.clips]


def refused(manifest: Manifest) -> list[tuple[str, str]]:
    return [(row.source, row.reason) for row in manifest.refused]


def between(start: float, end: float | None) -> TimeRange:
    return TimeRange(start=start, end=end)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_rows_of_one_range_are_one_clip_and_other_ranges_are_others(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "a.mp4", "text": "one", "start": "1.5", "end": "0:00:04"},
        {"path": "a.mp4", "text": "two", "start": "1:00", "end": ""},
        {"path": "a.mp4", "text": "three", "start": "1.50", "end": "4.0"},
        {"path": "a.mp4", "text": "four", "start": "0", "end": ""},
        {"path": "a.mp4", "text": "five", "start": "", "end": "1:00:00.250"},
    ]
    assert said(read_manifest(written(tmp_path, rows, kind))) == [
        ("a.mp4", ("one", "three"), between(1.5, 4.0)),
        ("a.mp4", ("two",), between(60.0, None)),
        ("a.mp4", ("four",), None),
        ("a.mp4", ("five",), between(0.0, 3600.25)),
    ]


def test_times_that_are_numbers_in_parquet_are_the_same(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "text": "one", "begin": 1.5, "stop": 4},
        {"path": "a.mp4", "text": "two", "begin": None, "stop": None},
        {"path": "b.mp4", "text": "three", "begin": 0.0, "stop": None},
    ]
    columns = {"begin": "start", "stop": "end"}
    manifest = read_manifest(written(tmp_path, rows, "parquet"), columns=columns)
    assert said(manifest) == [
        ("a.mp4", ("one",), between(1.5, 4.0)),
        ("a.mp4", ("two",), None),
        ("b.mp4", ("three",), None),
    ]
    rows[0]["stop"] = 1
    manifest = read_manifest(written(tmp_path, rows, "parquet"), columns=columns)
    assert refused(manifest) == [("a.mp4", "bad_range")]
    assert len(manifest.clips) == 2


@pytest.mark.parametrize(
    ("start", "end"), [("2", "2"), ("3", "2"), ("-1", "2"), ("nan", "2"), ("0", "inf"), ("0:61:00", "9999"), ("x", "2")]
)
def test_bad_ranges_are_refused(tmp_path: Path, start: str, end: str) -> None:
    rows = [{"path": "a.mp4", "text": "one", "start": start, "end": end}]
    manifest = read_manifest(written(tmp_path, rows, "csv"))
    assert refused(manifest) == [("a.mp4", "bad_range")]
    assert len(manifest.clips) == 0


PANDA = {
    "video": "v1.mp4",
    "timestamp": [["0:00:08.000", "0:00:12.500"], ["0:01:00.000", "0:01:05.000"]],
    "caption": ['it\'s a "dog", [running]', "a cat"],
    "score": [0.25, 0.5],
    "channel": "pets",
}


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_panda_70ms_lists_become_one_clip_a_range(tmp_path: Path, kind: str) -> None:
    rows = [
        PANDA,
        {**PANDA, "video": "v2.mp4", "caption": ["only one"]},
        {**PANDA, "video": "v3.mp4", "timestamp": [["5", "1"]]},
    ]
    mapping = parse_mapping(["video=path", "timestamp=range", "caption=text"])
    manifest = read_manifest(written(tmp_path, rows, kind), columns=mapping)
    assert said(manifest) == [
        ("v1.mp4", ('it\'s a "dog", [running]',), between(8.0, 12.5)),
        ("v1.mp4", ("a cat",), between(60.0, 65.0)),
    ]
    assert [clip.columns for clip in manifest.clips] == [
        {"score": 0.25, "channel": "pets"},
        {"score": 0.5, "channel": "pets"},
    ]
    assert refused(manifest) == [("v2.mp4", "bad_range"), ("v3.mp4", "bad_range")]
    assert manifest.refused[0].detail == "row 2: 2 ranges and 1 of caption: expected one for each"
    assert manifest.num_rows == 3


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_bad_range_of_a_row_costs_that_range_alone(tmp_path: Path, kind: str) -> None:
    rows = [
        {
            "path": "v1.mp4",
            "range": [["5", "1"], ["2", "3"], ["x", "9"], ["4", "6"]],
            "text": ["backwards", "one", "no time", "two"],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    ]
    manifest = read_manifest(written(tmp_path, rows, kind))
    assert said(manifest) == [("v1.mp4", ("one",), between(2.0, 3.0)), ("v1.mp4", ("two",), between(4.0, 6.0))]
    assert [clip.columns["score"] for clip in manifest.clips] == [2.0, 4.0]
    assert [(row.source, row.reason, row.detail) for row in manifest.refused] == [
        ("v1.mp4", "bad_range", "row 1, range 1 of 4: range 5 .. 1: expected 0 <= start < end"),
        ("v1.mp4", "bad_range", "row 1, range 3 of 4: 'x' is no time: expected seconds or H:MM:SS"),
    ]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_range_may_be_one_pair_of_seconds(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "a.mp4", "range": [1.5, 3.0], "text": "one"},
        {"path": "a.mp4", "range": [2.0, 3.0], "text": "two"},
    ]
    manifest = read_manifest(written(tmp_path, rows, kind))
    assert said(manifest) == [("a.mp4", ("one",), between(1.5, 3.0)), ("a.mp4", ("two",), between(2.0, 3.0))]


@pytest.mark.parametrize(
    "text", ["__import__('os')", "[1,", "[" * 100_000, "[[3]]", "[]", "{'a': 1}", "7", "[" * 150 + "]" * 150]
)
def test_what_is_no_list_of_ranges_is_refused_and_never_run(tmp_path: Path, text: str) -> None:
    rows = [{"path": "a.mp4", "range": text, "text": "one"}, {"path": "b.mp4", "range": "[[0, 1]]", "text": "two"}]
    manifest = read_manifest(written(tmp_path, rows, "csv"))
    assert refused(manifest) == [("a.mp4", "bad_range")]
    assert [clip.source for clip in manifest.clips] == ["b.mp4"]


def test_lists_are_read_in_json_and_in_pythons_notation() -> None:
    assert parse_list("['a', None]") == parse_list('["a", null]') == ["a", None]
    assert parse_list("[print(1)]") is None
    assert parse_list("('a',)") is None


def test_times_are_seconds_or_clock_times() -> None:
    assert [parse_seconds(text) for text in ("1:02:03.5", "2:03", "90:00", "7", 7, " 1e1 ")] == [
        3723.5,
        123,
        5400,
        7,
        7,
        10,
    ]
    for text in ("1:2:3:4", "1:60:00", "1:00:60", "0x10", "1_0", True):
        with pytest.raises(ValueError, match="is no time"):
            parse_seconds(text)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_several_columns_of_captions_are_several_captions(tmp_path: Path, kind: str) -> None:
    rows = [
        {"file": "a.mp4", "short": "one", "dense": "two"},
        {"file": "b.mp4", "short": " ", "dense": "three"},
        {"file": "c.mp4", "short": "same", "dense": "same"},
        {"file": "d.mp4", "short": "", "dense": ""},
        {"file": "e.mp4", "short": "x" * 5001, "dense": "kept"},
        {"file": "a.mp4", "short": "four", "dense": "one"},
    ]
    columns = {"file": "path", "short": "text", "dense": "text"}
    manifest = read_manifest(written(tmp_path, rows, kind), columns=columns)
    assert [(clip.source, clip.captions) for clip in manifest.clips] == [
        ("a.mp4", ("one", "two", "four")),
        ("b.mp4", ("three",)),
        ("c.mp4", ("same",)),
        ("e.mp4", ("kept",)),
    ]
    assert refused(manifest) == [("d.mp4", "no_caption"), ("e.mp4", "caption_too_long")]


def test_mira_data_and_open_vid_are_read_by_mapping(tmp_path: Path) -> None:
    mira = [{"file_path": "1/2.mp4", "short_caption": "s", "dense_caption": "d", "fps": 30, "seconds": 9.5}]
    names = parse_mapping(["file_path=path", "short_caption=text", "dense_caption=text"])
    (clip,) = read_manifest(written(tmp_path, mira, "csv"), columns=names).clips
    assert (clip.captions, clip.columns) == (("s", "d"), {"seconds": 9.5})
    open_vid = [{"video": "v.mp4", "caption": "c", "aesthetic score": 5.5, "frame": 64, "fps": 24, "seconds": 3}]
    names = parse_mapping(["video=path", "caption=text"])
    (clip,) = read_manifest(written(tmp_path, open_vid, "csv"), columns=names).clips
    assert (clip.source, clip.columns) == ("v.mp4", {"aesthetic score": 5.5, "frame": 64.0, "seconds": 3.0})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["video"], "--columns video: expected THEIRS=OURS"),
        (["=path"], "expected THEIRS=OURS"),
        (["video=file"], "OURS one of path, text, start, end, range"),
        (["a=path", "b=path"], "a and b are both to be path"),
        (["a=range", "b=start"], "range with start or end"),
        (["a=path", "a=text"], "a is given twice"),
    ],
)
def test_a_mapping_that_is_none_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_mapping(texts)


def test_a_name_with_an_equals_sign_can_be_mapped() -> None:
    assert parse_mapping(["a=b=text"]) == {"a=b": "text"}


def test_json_lines_give_the_same_as_csv(tmp_path: Path) -> None:
    lines = [
        '{"path": "a.mp4", "text": "one", "score": 5, "watermark": true, "id": "007"}',
        "",
        '{"path": "b.mp4", "text": "two\\nlines", "score": null, "watermark": false}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert [(clip.source, clip.captions, clip.columns) for clip in manifest.clips] == [
        ("a.mp4", ("one",), {"score": 5.0, "watermark": True, "id": "007"}),
        ("b.mp4", ("two\nlines",), {"score": None, "watermark": False, "id": None}),
    ]


def test_a_key_that_comes_late_is_a_column_of_all(tmp_path: Path) -> None:
    lines = [json.dumps({"path": f"{number}.mp4", "text": "t"}) for number in range(70_000)]
    lines.append('{"path": "late.mp4", "text": "t", "score": 3}')
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    clips = read_manifest(tmp_path / "m.jsonl").clips
    assert clips[0].columns == {"score": None}
    assert clips[70_000] == clips[-1]
    assert clips[-1].columns == {"score": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a", "path": "b", "text": "c"}', "line 1 is no JSON object: a key is there twice"),
        ('{"path": "a", "text": "c"}\n[1]', "line 2 is no JSON object"),
        ('{"path": "a", "text": "c"', "line 1 is no JSON object"),
        ("[" * 100_000, "line 1 is no JSON object"),
        ('{"path": "a", "text": ["b", "c"]}', "'text' holds a list: expected text"),
        ('{"path": "a", "text": "b", "more": {"c": 1}}', "'more' holds a dict"),
        ("", "no column 'path': found none"),
        ('{"path": "a"}', "no column 'text': found path"),
    ],
)
def test_lines_that_are_no_objects_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "m.jsonl")


def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "a", "text": "\\ud800"}\n{"path": "b", "text": "\\ud83d\\ude00"}\n')
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert refused(manifest) == [("a", "bad_text")]
    assert [clip.captions for clip in manifest.clips] == [("😀",)]


@pytest.mark.parametrize("seed", range(3))
def test_many_rows_in_any_order_are_merged_as_a_dictionary_would(tmp_path: Path, seed: int) -> None:
    import random

    chance = random.Random(seed)
    rows = [
        {"path": f"{chance.randrange(40_000)}.mp4", "text": f"caption {chance.randrange(5)}", "number": number}
        for number in range(150_000)
    ]
    expected: dict[str, tuple[dict[str, None], int]] = {}
    for row in rows:
        expected.setdefault(row["path"], ({}, row["number"]))[0][row["text"]] = None
    manifest = read_manifest(written(tmp_path, rows, "parquet"))
    found: list[Clip] = list(manifest.clips)
    assert [(clip.source, clip.captions, clip.columns["number"]) for clip in found] == [
        (path, tuple(texts), float(number)) for path, (texts, number) in expected.items()
    ]
    assert [manifest.clips[number] for number in (0, 100, -1)] == [found[0], found[100], found[-1]]
    assert manifest.clips[5:9] == found[5:9]
