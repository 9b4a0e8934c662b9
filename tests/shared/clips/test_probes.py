"""Probes that are kept: extended, never made anew."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared.clips.probes import FileToProbe, ProbedClip, Probes, ProbeTask, probe_file, refused_file
from shared.errors import InputError
from shared.media.clip import Clip, Media, TimeRange
from shared.media.manifest import Manifest
from shared.stores.local import LocalStore
from shared.stores.store import Entry
from tests.shared.clips.planning import clip, manifest_of, probed

FIRST, SECOND = TimeRange(start=0.0, end=1.0), TimeRange(start=1.0)


def opened(folder: Path) -> Probes:
    """Returns the probes in a folder, as another job opens them."""
    return Probes.open(LocalStore(folder))


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def named(tasks: object) -> list[tuple[str, int]]:
    """Returns the files of tasks and how many clips are wanted of each."""
    assert hasattr(tasks, "__iter__")
    return [(file.source, len(file.ranges)) for task in tasks for file in task.files]


def anew(tasks: Iterable[ProbeTask]) -> list[str]:
    """Returns the files of tasks that are probed without a look whether that is needed."""
    return [file.source for task in tasks for file in task.files if file.stamp is None and not file.facts]


def run(probes: Probes, tasks: Iterable[ProbeTask]) -> list[str]:
    """Does tasks, and returns of which files something was found."""
    found = [row for task in tasks for file in task.files for row in probe_file(file)]
    probes.add(found)
    return [row.source for row in found]


def videos_of(folder: Path, names: Iterable[str] = ("meadow.mpg", "cloud_square.mkv")) -> Manifest:
    return manifest_of(Clip(source=name, media=Media(url=str(folder / name)), captions=("x",)) for name in names)


def frames(probes: Probes, manifest: Manifest) -> list[int | None]:
    frames_of: list[int | None] = probes.table_for(manifest)["num_frames"].to_pylist()
    return frames_of


def test_what_is_probed_is_not_probed_again_and_stands_beside_its_row(tmp_path: Path) -> None:
    clips = [clip("a", num_frames=1), clip("b", num_frames=2, fps=Fraction(30000, 1001)), clip("c", num_frames=3)]
    opened(tmp_path).add(probed(clips[2]) + probed(clips[1]))
    manifest = manifest_of([*(made.clip for made in clips), clip("d").clip])
    probes = opened(tmp_path)
    assert named(probes.missing(manifest)) == [("a", 1), ("d", 1)]
    table = probes.table_for(manifest)
    assert table["num_frames"].to_pylist() == [None, 2, 3, None]
    assert (table["fps_num"][1].as_py(), table["fps_den"][1].as_py()) == (30000, 1001)
    assert table["version"].to_pylist() == [None, "1", "1", None]
    assert len(parts(tmp_path)) == 1


def test_all_clips_of_a_file_are_probed_together(tmp_path: Path) -> None:
    rows = [("a", FIRST), ("b", None), ("a", SECOND), ("b", SECOND), ("c", None), ("a", None)]
    manifest = manifest_of(clip(name, time_range=times).clip for name, times in rows)
    tasks = opened(tmp_path).missing(manifest)
    assert tasks.num_clips == 6
    (task,) = tasks
    assert task.num_clips == 6
    assert [(file.source, file.ranges) for file in task.files] == [
        ("a", (FIRST, SECOND, None)),
        ("b", (None, SECOND)),
        ("c", (None,)),
    ]


def test_tasks_hold_some_files_each(tmp_path: Path) -> None:
    tasks = opened(tmp_path).missing(manifest_of(clip(f"{n}").clip for n in range(40)))
    assert [len(task.files) for task in tasks] == [16, 16, 8]
    assert tasks[-1].files[-1].media == Media(url="/folder/39")
    assert [len(task.files) for task in tasks[1:]] == [16, 8]
    assert isinstance(tasks[0], ProbeTask)


def test_parts_of_a_clip_have_probes_of_their_own(tmp_path: Path) -> None:
    clips = [clip("a", num_frames=10), clip("a", num_frames=4, time_range=FIRST)]
    other = clip("a", time_range=SECOND)
    opened(tmp_path).add(probed(clips[1]) + probed(clips[0]))
    manifest = manifest_of([clips[0].clip, other.clip, clips[1].clip])
    assert frames(opened(tmp_path), manifest) == [10, None, 4]
    assert [file.ranges for task in opened(tmp_path).missing(manifest) for file in task.files] == [(SECOND,)]


def test_a_part_from_the_beginning_is_one_whether_its_start_is_written_or_not(tmp_path: Path) -> None:
    part = clip("a", num_frames=4, time_range=FIRST)
    opened(tmp_path).add(probed(part))
    manifest = manifest_of([part.clip])
    unwritten = manifest.table.set_column(manifest.table.column_names.index("start"), "start", [[None]]).cast(
        manifest.table.schema
    )
    again = Manifest(root="/", num_rows=1, table=unwritten, refused=())
    assert frames(opened(tmp_path), again) == [4]


def test_of_several_probes_of_a_clip_the_newest_counts(tmp_path: Path) -> None:
    manifest = manifest_of([clip("a").clip])
    for number in (5, 9, 7):
        opened(tmp_path).add(probed(clip("a", num_frames=number)))
        assert frames(opened(tmp_path), manifest) == [number]


def test_clips_that_cannot_be_used_are_stored_with_the_reason_unless_it_may_pass(tmp_path: Path) -> None:
    for name in "ad":
        (tmp_path / name).write_text("a poem")
    files = [FileToProbe(source=name, media=Media(url=str(tmp_path / name)), ranges=(None,)) for name in "abcd"]
    probes = opened(tmp_path)
    rows = [
        *refused_file(files[0], "not_a_video", "found a poem"),
        *refused_file(files[1], "missing", "no file"),
        *refused_file(files[2], "not_readable", "slow down", transient=True),
        *refused_file(files[3], "decoder_crashed", "its worker died"),
    ]
    assert probes.add(rows) == 2
    manifest = videos_of(tmp_path, "abcd")
    assert anew(probes.missing(manifest)) == ["b", "c"]
    table = probes.table_for(manifest)
    assert table["reason"].to_pylist() == ["not_a_video", None, None, "decoder_crashed"]
    assert table["detail"][0].as_py() == "found a poem"
    assert probes.add(rows[1:3]) == 0


def test_reasons_that_are_tried_again_are_probed_again(tmp_path: Path) -> None:
    clips = [clip("a", reason="not_a_video"), clip("b", reason="no_frames"), clip("c")]
    opened(tmp_path).add([row for made in clips for row in probed(made)])
    manifest = manifest_of(made.clip for made in clips)
    assert anew(opened(tmp_path).missing(manifest)) == []
    assert opened(tmp_path).refused(manifest) == {"not_a_video": 1, "no_frames": 1}
    assert opened(tmp_path).refused(manifest_of([clips[1].clip])) == {"no_frames": 1}
    assert anew(opened(tmp_path).missing(manifest, retry_refused=["not_a_video"])) == ["a"]
    opened(tmp_path).add(probed(clip("a")))
    assert named(opened(tmp_path).missing(manifest, retry_refused=["not_a_video"])) == [("b", 1)]


def test_sources_whose_probes_were_wrong_can_be_probed_again(tmp_path: Path) -> None:
    rows = [("a", None), ("b", FIRST), ("c", None), ("b", SECOND)]
    clips = [clip(name, time_range=times) for name, times in rows]
    probes = opened(tmp_path)
    probes.add([row for made in clips for row in probed(made)])
    assert named(probes.again(manifest_of(made.clip for made in clips), ["b"])) == [("b", 2)]


def test_many_parts_become_one_that_says_the_same(tmp_path: Path) -> None:
    manifest = manifest_of(clip(f"{n % 20}").clip for n in range(20))
    for number in range(70):
        opened(tmp_path).add(probed(clip(f"{number % 20}", num_frames=number)))
    assert len(parts(tmp_path)) <= 33
    assert frames(opened(tmp_path), manifest) == [60 + n if n < 10 else 40 + n for n in range(20)]


class DyingStore(LocalStore):
    """Dies when it deletes for the second time."""

    num_deleted = 0

    def delete(self, path: str) -> None:
        self.num_deleted += 1
        if self.num_deleted == 2:
            raise KeyboardInterrupt
        super().delete(path)


def test_a_job_that_is_killed_while_it_merges_parts_costs_nothing(tmp_path: Path) -> None:
    for number in range(32):
        opened(tmp_path).add(probed(clip(f"{number}", num_frames=number)))
    with pytest.raises(KeyboardInterrupt):
        Probes.open(DyingStore(tmp_path)).add(probed(clip("32", num_frames=32)))
    manifest = manifest_of(clip(f"{number}").clip for number in range(33))
    assert frames(opened(tmp_path), manifest) == list(range(33))
    opened(tmp_path).add(probed(clip("0", num_frames=100)))
    assert len(parts(tmp_path)) == 1
    assert frames(opened(tmp_path), manifest) == [100, *range(1, 33)]


class RacedStore(LocalStore):
    """Another job merges all parts between its first listing and what follows."""

    is_raced = False

    def list(self, prefix: str = "") -> Iterator[Entry]:
        entries = list(super().list(prefix))
        if not self.is_raced:
            self.is_raced = True
            opened(Path(self.url)).add(probed(clip("another", num_frames=7)))
        return iter(entries)


@pytest.mark.parametrize("does_add", [False, True])
def test_two_jobs_that_add_and_merge_at_once_lose_nothing(tmp_path: Path, does_add: bool) -> None:
    for number in range(32):
        opened(tmp_path).add(probed(clip(f"{number}", num_frames=number)))
    store = RacedStore(tmp_path)
    if does_add:
        Probes.open(store).add(probed(clip("mine", num_frames=8)))
    manifest = manifest_of(clip(name).clip for name in [*(f"{number}" for number in range(32)), "another"])
    assert frames(Probes.open(store), manifest) == [*range(32), 7]
    assert store.is_raced
    assert frames(opened(tmp_path), manifest_of([clip("mine").clip])) == ([8] if does_add else [None])


def test_a_part_that_is_lost_costs_probing_its_clips_again_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for name in "ab":
        opened(tmp_path).add(probed(clip(name)))
    first, second = parts(tmp_path)
    first.unlink()
    assert named(opened(tmp_path).missing(manifest_of(clip(name).clip for name in "ab"))) == [("a", 1)]
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{second.name}: not readable .*: delete it"):
        opened(tmp_path).missing(manifest_of([clip("a").clip]))


@pytest.fixture
def videos(clips_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clips_folder, tmp_path / "videos"))


def test_a_file_is_probed_again_if_it_changed_and_only_then(videos: Path, tmp_path: Path) -> None:
    manifest, probes = videos_of(videos), opened(tmp_path / "probes")
    first, second = manifest.table["source"].to_pylist()
    run(probes, probes.missing(manifest))
    before = probes.table_for(manifest)
    assert before["reason"].null_count == 2
    assert min(before["num_frames"].to_pylist()) > 1
    shutil.copyfile(videos / second, videos / first)
    assert named(opened(tmp_path / "probes").missing(manifest)) == []
    assert run(probes, probes.missing(manifest, check_stamps=True)) == [first]
    after = probes.table_for(manifest)
    assert after["version"][0] == after["version"][1] == before["version"][1] != before["version"][0]


def test_files_of_one_name_in_two_data_sets_have_probes_of_their_own(videos: Path, tmp_path: Path) -> None:
    """Even if their sizes and times of change are the same."""
    other, probes = tmp_path / "other", opened(tmp_path / "probes")
    other.mkdir()
    content = bytearray((videos / "meadow.mpg").read_bytes())
    content[-1] ^= 1
    (other / "meadow.mpg").write_bytes(content)
    for folder in (videos, other):
        os.utime(folder / "meadow.mpg", (1, 1))
    manifests = [videos_of(folder, ["meadow.mpg"]) for folder in (videos, other)]
    versions = []
    for manifest in manifests:
        assert probes.table_for(manifest)["version"].null_count == 1
        assert run(probes, probes.missing(manifest)) == ["meadow.mpg"]
        versions += probes.table_for(manifest)["version"].to_pylist()
    assert versions[0] != versions[1]
    for manifest, version in zip(manifests, versions, strict=True):
        assert named(opened(tmp_path / "probes").missing(manifest)) == []
        assert opened(tmp_path / "probes").table_for(manifest)["version"].to_pylist() == [version]


def test_a_member_of_a_tar_that_was_written_anew_is_not_believed(tmp_path: Path) -> None:
    probes = opened(tmp_path)
    made = clip("a.tar/b")
    places = [Media(url="/a.tar", offset=512, size=9), Media(url="/a.tar", offset=1024, size=9)]
    old, new, other = (
        replace(made, clip=replace(made.clip, media=media)) for media in (*places, replace(places[0], size=8))
    )
    probes.add(probed(old))
    assert named(probes.missing(manifest_of([old.clip]))) == []
    for moved in (new, other):
        assert probes.table_for(manifest_of([moved.clip]))["version"].to_pylist() == [None]
        assert named(probes.missing(manifest_of([moved.clip]))) == [("a.tar/b", 1)]


def test_a_data_set_that_moved_keeps_its_probes_and_is_looked_at_once(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes, moved = opened(tmp_path / "probes"), videos_of(tmp_path / "moved")
    run(probes, probes.missing(videos_of(videos)))
    before = probes.table_for(videos_of(videos))
    shutil.copytree(videos, tmp_path / "moved", copy_function=shutil.copyfile)
    monkeypatch.setattr("shared.clips.probes.probe", None)
    assert len(run(probes, probes.missing(moved))) == 2
    assert probes.table_for(moved) == before
    assert named(opened(tmp_path / "probes").missing(moved)) == []


def test_clips_that_were_probed_before_places_were_kept_are_looked_at_once(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = tmp_path / "probes", videos_of(videos)
    probes = opened(folder)
    run(probes, probes.missing(manifest))
    before = probes.table_for(manifest)
    (path,) = parts(folder)
    pq.write_table(pq.read_table(path).drop_columns("url"), path)
    monkeypatch.setattr("shared.clips.probes.probe", None)
    assert len(run(probes, opened(folder).missing(manifest))) == 2
    assert opened(folder).table_for(manifest) == before
    assert named(opened(folder).missing(manifest)) == []


def test_a_file_that_was_refused_is_probed_again_once_it_is_mended(videos: Path, tmp_path: Path) -> None:
    probes, manifest = opened(tmp_path / "probes"), videos_of(videos, ["a.mkv", "meadow.mpg"])
    (videos / "a.mkv").write_text("a poem" * 100)
    assert run(probes, probes.missing(manifest)) == ["a.mkv", "meadow.mpg"]
    assert probes.table_for(manifest)["reason"].to_pylist() == ["not_a_video", None]
    assert named(probes.missing(manifest)) == [("a.mkv", 1)]
    assert run(probes, probes.missing(manifest)) == []
    shutil.copyfile(videos / "cloud_square.mkv", videos / "a.mkv")
    assert run(probes, probes.missing(manifest)) == ["a.mkv"]
    assert probes.table_for(manifest)["reason"].null_count == 2
    assert named(probes.missing(manifest)) == []


def test_a_file_that_is_gone_is_looked_for_again(tmp_path: Path) -> None:
    file = FileToProbe(source="a", media=Media(url=str(tmp_path / "a.mp4")), ranges=(None, FIRST))
    found = probe_file(file)
    assert [(row.reason, row.transient, row.stamp) for row in found] == [("missing", True, None)] * 2


def test_a_file_that_is_no_video_is_refused_for_good(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("a poem" * 100)
    (found,) = probe_file(FileToProbe(source="a", media=Media(url=str(tmp_path / "a.mp4")), ranges=(None,)))
    assert isinstance(found, ProbedClip)
    assert found.facts is None
    assert found.reason == "not_a_video"
    assert not found.transient
    assert found.stamp is not None
