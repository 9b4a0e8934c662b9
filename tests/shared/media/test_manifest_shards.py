"""WebDataset shards and folders of clips."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from shared.errors import InputError
from shared.media.manifest import Manifest, read_manifest
from shared.media.sources import open_source

REAL = Path(__file__).parents[4] / "shared/data/clips/video2dataset_shard.tar"


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:  # noqa: A002
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            tar.addfile(facts, io.BytesIO(content))
    return path


def sample(key: str, text: str = "a text", ending: str = "mp4") -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", f"bytes of {key}".encode()), (f"{key}.txt", text.encode())]


def sources(manifest: Manifest) -> list[str]:
    return [clip.source for clip in manifest.clips]


def refused(manifest: Manifest) -> list[tuple[str, str]]:
    return [(row.source, row.reason) for row in manifest.refused]


def contents(manifest: Manifest) -> list[bytes]:
    found = []
    for clip in manifest.clips:
        with open_source(clip.media) as file:
            found.append(file.read())
    return found


def test_members_that_share_a_name_are_one_clip(tmp_path: Path) -> None:
    facts = json.dumps({"score": 5, "tags": ["x"], "nsfw": False, "caption": "not this", "path": "c:/x"}).encode()
    members = [*sample("000", "one\n"), ("000.json", facts), ("001.json", b'{"text": "two"}'), ("001.jpg", b"jpeg")]
    manifest = read_manifest(write_tar(tmp_path / "s.tar", members))
    assert [(clip.source, clip.captions, clip.columns) for clip in manifest.clips] == [
        ("s.tar/000.mp4", ("one",), {"score": 5.0, "nsfw": False}),
        ("s.tar/001.jpg", ("two",), {"score": None, "nsfw": None}),
    ]
    assert contents(manifest) == [b"bytes of 000", b"jpeg"]
    assert manifest.root == str(tmp_path)


def test_keys_of_the_json_are_mapped(tmp_path: Path) -> None:
    facts = json.dumps({"title": "a title", "cuts": [[0, 1.5], [2, 3]], "start": 9}).encode()
    path = write_tar(tmp_path / "s.tar", [*sample("000"), ("000.json", facts)])
    manifest = read_manifest(path, columns={"title": "text", "cuts": "range"})
    assert [(clip.captions, clip.time_range.end) for clip in manifest.clips if clip.time_range] == [
        (("a title",), 1.5),
        (("a title",), 3.0),
    ]
    assert contents(manifest) == [b"bytes of 000"] * 2
    with pytest.raises(InputError, match="no column 'none'"):
        read_manifest(path, columns={"none": "text"})
    with pytest.raises(InputError, match="the clips of shards are their members"):
        read_manifest(path, columns={"title": "path"})


def test_patterns_name_many_shards(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(12):
        write_tar(tmp_path / "a" / f"{number:03d}.tar", sample(f"{number}"))
    expected = [f"{number:03d}.tar/{number}.mp4" for number in range(12)]
    assert sources(read_manifest(tmp_path / "a" / "{000..011}.tar")) == expected
    assert sources(read_manifest(tmp_path / "a" / "*.tar")) == expected
    assert sources(read_manifest(tmp_path / "a" / "{011,003}.tar")) == [expected[11], expected[3]]
    assert sources(read_manifest(tmp_path / "**" / "00?.tar")) == [f"a/{name}" for name in expected[:10]]
    with pytest.raises(InputError, match="no such file .*012.tar"):
        read_manifest(tmp_path / "a" / "{000..012}.tar")
    with pytest.raises(InputError, match="no such file"):
        read_manifest(tmp_path / "b" / "*.tar")
    with pytest.raises(InputError, match="more than 1,000,000 shards"):
        read_manifest(tmp_path / "{0..999999999}.tar")
    with pytest.raises(InputError, match="braces are not balanced"):
        read_manifest(tmp_path / "{0..9.tar")


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_does(tmp_path: Path, format_: int) -> None:
    keys = ["short", f"{'d' * 90}/{'n' * 80}", "umlaut-ü"]
    if format_ != tarfile.USTAR_FORMAT:
        keys.append("/".join(["e" * 90] * 5))
    path = write_tar(tmp_path / "s.tar", [pair for key in keys for pair in sample(key)], format_)
    manifest = read_manifest(path)
    assert sources(manifest) == [f"s.tar/{key}.mp4" for key in keys]
    assert contents(manifest) == [f"bytes of {key}".encode() for key in keys]


def test_a_pax_size_and_global_headers_are_obeyed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
        for name, content in sample("000"):
            facts = tarfile.TarInfo(name)
            facts.size, facts.pax_headers = len(content), {"size": str(len(content)), "mtime": "1.5"}
            tar.addfile(facts, io.BytesIO(content))
    assert contents(read_manifest(tmp_path / "s.tar")) == [b"bytes of 000"]


def test_hostile_members_are_refused_or_passed_over_and_nothing_is_unpacked(tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside.mp4"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in (str(outside), "../up.mp4", "twice.mp4", "twice.mp4", "new\nline.mp4"):
            for member, content in ((name, b"clip"), (f"{name[:-4]}.txt", b"a text")):
                facts = tarfile.TarInfo(member)
                facts.size = len(content)
                tar.addfile(facts, io.BytesIO(content))
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        device = tarfile.TarInfo("device.mp4")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    manifest = read_manifest(tmp_path / "s.tar")
    assert sources(manifest) == [f"s.tar/{outside}", "s.tar/../up.mp4", "s.tar/twice.mp4", "s.tar/new\nline.mp4"]
    assert [reason for _, reason in refused(manifest)] == ["duplicate_member", "duplicate_member"]
    assert not outside.exists()
    assert contents(manifest) == [b"clip"] * 4


def test_bad_captions_and_json_refuse_their_clip_alone(tmp_path: Path) -> None:
    members = [
        ("a.mp4", b"x"),
        ("b.mp4", b"x"),
        ("b.txt", b"\xff\xfe"),
        ("c.mp4", b"x"),
        ("c.json", b'{"caption": "one", "caption": "two"}'),
        ("d.mp4", b"x"),
        ("d.json", b"cposix\nsystem\n"),
        ("e.mp4", b"x"),
        ("e.txt", b"y" * 2_000_000),
        *sample("f"),
        ("f.jpg", b"its thumbnail"),
        ("f.pyd", b"cposix\nsystem\n"),
    ]
    manifest = read_manifest(write_tar(tmp_path / "s.tar", members))
    assert sources(manifest) == ["s.tar/f.mp4"]
    assert sorted(refused(manifest)) == [
        ("s.tar/a.mp4", "no_caption"),
        ("s.tar/b.mp4", "bad_text"),
        ("s.tar/c.mp4", "bad_json"),
        ("s.tar/d.mp4", "bad_json"),
        ("s.tar/e.mp4", "caption_too_long"),
    ]


def test_a_cut_tar_gives_what_lies_before_the_cut_and_says_so(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", [pair for key in "abcd" for pair in sample(key)]).read_bytes()
    full = sources(read_manifest(tmp_path / "s.tar"))
    for cut in (*range(0, 8 * 1024, 301), 1539, 2048 + 1540):
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        manifest = read_manifest(tmp_path / "s.tar")
        num_whole = sum(cut >= 2048 * number + 1536 + len("a text") for number in range(4))
        assert sources(manifest) == full[:num_whole], cut
        assert refused(manifest)[0] == ("s.tar", "truncated_tar")
        assert contents(manifest) == [f"bytes of {key}".encode() for key in "abcd"[:num_whole]]


def test_a_file_that_is_no_tar_says_so(tmp_path: Path) -> None:
    for content in (b"x" * 5000, os.urandom(5000), b""):
        (tmp_path / "s.tar").write_bytes(content)
        manifest = read_manifest(tmp_path / "s.tar")
        assert refused(manifest) == [("s.tar", "truncated_tar")]
        assert len(manifest.clips) == 0


@pytest.mark.skipif(not REAL.exists(), reason="material outside this repository")
def test_a_shard_of_video2dataset_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(REAL)
    with tarfile.open(REAL) as tar:
        expected = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".mp4")}
        assert dict(
            zip([source.partition("/")[2] for source in sources(manifest)], contents(manifest), strict=True)
        ) == {name: file.read() for name, file in expected.items() if file}
    assert manifest.clips[0].captions[0].startswith("Banksy Bashes Design")
    assert manifest.clips[0].columns["original_width"] == 800.0


def test_a_folder_gives_its_clips_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.MP4", "a.mkv", "b/1.png", "notes.md", "b/none.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for name in ("b/2.txt", "a.txt", "b/1.txt"):
        (tmp_path / name).write_text(f" {name}\n")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    (tmp_path / "b" / "and again").symlink_to(tmp_path)
    (tmp_path / "b" / "bad.mp4").write_bytes(b"x")
    (tmp_path / "b" / "bad.txt").write_bytes(b"\xff")
    os.mkfifo(tmp_path / "b" / "fifo.txt")
    (tmp_path / "b" / "fifo.mp4").write_bytes(b"x")
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"x")
    manifest = read_manifest(tmp_path)
    assert [(clip.source, clip.captions) for clip in manifest.clips] == [
        ("a.mkv", ("a.txt",)),
        ("b/1.png", ("b/1.txt",)),
        ("b/2.MP4", ("b/2.txt",)),
    ]
    assert contents(manifest) == [b"a.mkv", b"b/1.png", b"b/2.MP4"]
    assert sorted(reason for _, reason in refused(manifest)) == ["bad_path", "bad_text", "no_caption", "not_a_file"]
    with pytest.raises(InputError, match="no column 'video'"):
        read_manifest(tmp_path, columns={"video": "path"})


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no clips: expected files .mp4"):
        read_manifest(tmp_path)
