"""What the command that probes says of a manifest with nothing to look at, before it joins a cluster."""

from pathlib import Path

import pytest

from preprocess.probe import main
from shared.errors import run_entry_point


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (
            ["a.mp4,", "b.mp4,", ",no path", "c.mp4,"],
            "none of its 4 rows can be used: 3 no_caption, 1 no_path, e.g. a.mp4: row 1 has no text: expected the path "
            "of a clip and a text in each",
        ),
        ([], "it names no clip: expected at least one row"),
    ],
    ids=["every row is refused", "no rows"],
)
def test_a_manifest_without_a_row_to_use_is_refused_in_one_line_with_the_reasons(
    rows: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("\n".join(["path,text", *rows]) + "\n")
    options = ["--manifest", str(manifest), "--probes", str(tmp_path / "probes"), "--address", "127.0.0.1:1"]
    monkeypatch.setattr("sys.argv", ["probe", *options])
    assert run_entry_point(main, debug=False) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: manifest {manifest}: {complaint}")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not (tmp_path / "probes").exists()
