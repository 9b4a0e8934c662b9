"""Manifests, sound and not."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import InputError
from shared.media.clip import Media
from shared.media.manifest import read_manifest


def write(folder: Path, text: str, name: str = "m.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def test_rows_of_one_path_are_one_clip_with_several_captions(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "path,text\na.mp4,one\nb.mp4,two\na.mp4,three\na.mp4,one\n"))
    assert manifest.num_rows == 4
    assert [(clip.source, clip.captions) for clip in manifest.clips] == [
        ("a.mp4", ("one", "three")),
        ("b.mp4", ("two",)),
    ]
    assert manifest.clips[0].media == Media(url=str(tmp_path / "a.mp4"))


def test_captions_keep_their_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, '\ufeffpath,text\r\na.mp4,"one, ""two""\nthree"\r\n'))
    assert manifest.clips[0].captions == ('one, "two"\nthree',)


def test_open_soras_further_columns_are_known(tmp_path: Path) -> None:
    header = "path,text,num_frames,height,width,aspect_ratio,resolution,fps"
    manifest = read_manifest(write(tmp_path, f"{header}\na.mp4,one,51,480,854,0.56,409920,30\n"))
    assert len(manifest.clips) == 1


def test_parquet_gives_the_same_as_csv(tmp_path: Path) -> None:
    csv = write(tmp_path, "path,text,fps\na.mp4,one,3\nb.mp4,,3\n")
    table = pa.table({"path": ["a.mp4", "b.mp4"], "text": ["one", None], "fps": [3, 3]})
    pq.write_table(table, tmp_path / "m.parquet")
    typed, untyped = read_manifest(tmp_path / "m.parquet"), read_manifest(csv)
    assert list(typed.clips) == list(untyped.clips)
    assert list(typed.refused) == list(untyped.refused)


def test_columns_are_mapped_and_left_out_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "video,caption,aesthetic\na.mp4,one,5\n")
    manifest = read_manifest(path, columns={"video": "path", "caption": "text"}, ignore=["aesthetic"])
    assert manifest.clips[0].source == "a.mp4"
    assert manifest.clips[0].captions == ("one",)


def test_other_columns_are_kept_as_numbers_truth_values_or_text(tmp_path: Path) -> None:
    rows = "a.mp4,one,5,True,still,1\na.mp4,two,6,True,x,2\nb.mp4,three,,False,2,x\n"
    manifest = read_manifest(write(tmp_path, f"path,text,aesthetic,watermark,camera,mixed\n{rows}"))
    assert [dict(clip.columns) for clip in manifest.clips] == [
        {"aesthetic": 5.0, "watermark": True, "camera": "still", "mixed": "1"},
        {"aesthetic": None, "watermark": False, "camera": "2", "mixed": "x"},
    ]


def test_what_a_manifest_says_of_size_and_length_is_not_kept(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "path,text,num_frames,fps,height\na.mp4,one,5,24,100\n"))
    assert manifest.clips[0].columns == {}


def test_rows_without_path_or_caption_are_refused_one_by_one(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, "path,text\n,one\nb.mp4, \nc.mp4,three\nd\x00.mp4,four\n"))
    assert [(row.source, row.reason) for row in manifest.refused] == [
        ("row 1", "no_path"),
        ("b.mp4", "no_caption"),
        ("'d\\x00.mp4'", "bad_path"),
    ]
    assert [clip.source for clip in manifest.clips] == ["c.mp4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,text\na,b\n", "no column 'path': found file, text: name it by --columns NAME=path"),
        ("", "no column 'path'"),
        ("path;text\na.mp4;b\n", "found path;text: its header has ';' where a CSV has commas: write it with commas"),
        ("path,text\na.mp4,one, two\n", "row 1 has 3 fields: expected 2: quote its commas"),
        ('path,text\na.mp4,"one\n', "not readable as UTF-8 CSV"),
    ],
)
def test_a_manifest_with_other_columns_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(write(tmp_path, text))


def test_a_mapped_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'video': found path, text"):
        read_manifest(write(tmp_path, "path,text\na,b\n"), columns={"video": "path"})


def test_captions_in_a_list_column_are_refused_and_not_written_as_python(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.mp4"], "text": [["one", "two"]]}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="column 'text' is of type list.*: expected text: write one row a caption"):
        read_manifest(tmp_path / "m.parquet")


def test_a_caption_of_a_whole_book_is_refused(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, f"path,text\na.mp4,{'a.' * 3000}\n"))
    assert [(row.source, row.reason) for row in manifest.refused] == [("a.mp4", "caption_too_long")]


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no such file: expected a .csv, .parquet or .jsonl with columns path and text"
    ):
        read_manifest(tmp_path / "none.csv")


def test_a_manifest_that_is_no_text_or_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"path,text\n\xff\xfe,\x00\n")
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="not readable as UTF-8 CSV"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_manifest(tmp_path / "m.parquet")
    with pytest.raises(InputError, match=r"ending '.txt': expected"):
        read_manifest(write(tmp_path, "", "m.txt"))


def test_names_with_line_breaks_and_dots_are_names(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 'path,text\n"a\nb.mp4",one\n../c.mp4,two\n/d.mp4,three\n'))
    assert [clip.media.url for clip in manifest.clips] == [f"{tmp_path}/a\nb.mp4", f"{tmp_path}/../c.mp4", "/d.mp4"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two columns are called 'text': name each column once"):
        read_manifest(write(tmp_path, "path,text,text\na,b,c\n"))


def test_text_in_parquet_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"path": ["a.mp4"], "text": bad}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_all_kinds_of_text_in_parquet_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {name: pa.array([name, None, name]).cast(kind) for name in ("path", "text", "camera")}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    (clip,) = read_manifest(tmp_path / "m.parquet").clips
    assert (clip.source, clip.captions, clip.columns) == ("path", ("text",), {"camera": "camera"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, None], [1.0, 2.0, None]),
        ([0.5, float("nan"), float("inf")], [0.5, None, None]),
        ([2**53 + 2, 0, 1], ["9007199254740994", "0", "1"]),
        ([1e17, 1.0, None], ["1e+17", "1.0", None]),
        ([True, False, None], [True, False, None]),
        ([None, None, None], [None, None, None]),
        (["1.", "+.5e1", ""], [1.0, 5.0, None]),
        (["007", "1", "2"], ["007", "1", "2"]),
        (["true", "False", None], [True, False, None]),
        (["nan", "nan", ""], ["nan", "nan", ""]),
    ],
)
def test_a_column_is_what_all_of_its_values_are(tmp_path: Path, values: list, expected: list) -> None:
    table = pa.table({"path": ["a", "b", "c"], "text": ["t"] * 3, "value": pa.array(values)})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=1)
    assert [clip.columns["value"] for clip in read_manifest(tmp_path / "m.parquet").clips] == expected


def test_a_manifest_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    manifest = read_manifest(write(tmp_path, "path,text\na.mp4,one\na.mp4,two\n"))
    assert list((tmp_path / "temporary").iterdir()) == []
    assert manifest.clips[0].captions == ("one", "two")
    assert manifest.table.column_names == ["source", "url", "offset", "size", "start", "end", "captions"]


def test_a_list_without_a_clip_is_no_list_of_nothing(tmp_path: Path) -> None:
    empty = read_manifest(write(tmp_path, "path,text\n"))
    with pytest.raises(InputError, match="manifest list.csv: it names no clip: expected at least one row"):
        empty.require_usable("list.csv")
    read_manifest(write(tmp_path, "path,text\na.mp4,one\n")).require_usable("list.csv")
