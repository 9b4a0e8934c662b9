"""Probing: the truth of a clip and of parts of it, or why it is refused."""

import csv
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shared.media import container
from shared.media.clip import Media, TimeRange
from shared.media.probe import file_version, probe
from shared.media.refusal import MediaError
from shared.media.video import presentation_times
from tests.conftest import ClipMaker
from tests.shared.media.made_clips import grey, media_of, write_clip


def reason_of(path: Path) -> str:
    """Returns why a file is refused for good."""
    with pytest.raises(MediaError) as refused:
        probe(media_of(path))
    assert not refused.value.transient
    return refused.value.reason


def test_probing_finds_the_truth_of_every_real_clip(clips_folder: Path) -> None:
    with open(clips_folder / "clips.csv", newline="") as file:
        sources = {row["path"] for row in csv.DictReader(file)} - {"not_a_video.mp4"}
    assert len(sources) > 4
    for source in sources:
        media = media_of(clips_folder / source)
        (facts,) = probe(media)
        assert facts.num_frames == len(presentation_times(media)) >= 17
        assert min(facts.height, facts.width) >= 256
        assert 8 <= facts.fps <= 60
        assert facts.duration == pytest.approx(facts.num_frames / facts.fps, rel=0.05)


def test_ranges_of_a_file_are_probed_together(make_clip: ClipMaker) -> None:
    media = media_of(make_clip(num_frames=20, fps=10))
    ranges = [None, TimeRange(start=0.5, end=1.0), TimeRange(start=1.5), TimeRange(start=5.0, end=6.0)]
    found = probe(media, ranges)
    assert [(facts.num_frames, facts.duration) for facts in found] == [(20, 2.0), (5, 0.5), (5, 0.5), (0, 0.0)]
    assert {(facts.version, facts.height, facts.width, facts.fps) for facts in found} == {
        (file_version(media), 64, 96, Fraction(10))
    }


def test_a_rate_far_from_the_frames_times_is_not_believed(tmp_path: Path) -> None:
    """Matroska says 10 frames a second here, and the times of the frames say 2."""
    path = write_clip(tmp_path / "a.mkv", [grey(n) for n in range(5)], times=range(0, 2500, 500), rate=10)
    assert probe(media_of(path))[0].fps == 2


def with_tick(path: Path, nanoseconds: int) -> Path:
    """Changes how long a Matroska file says that a tick of its is."""
    head, mark, rest = path.read_bytes().partition(b"\x2a\xd7\xb1")
    num_bytes = rest[0] & 0x7F
    path.write_bytes(head + mark + rest[:1] + nanoseconds.to_bytes(num_bytes, "big") + rest[1 + num_bytes :])
    return path


@pytest.mark.parametrize(
    ("times", "tick", "reason"),
    [
        ([0, 500, 10**8], 2**24 - 1, "too_long"),
        ([0, 2_000_000, 4_000_000], 10**6, "no_frame_rate"),
        ([0, 1, 2], 1, "no_frame_rate"),
    ],
)
def test_times_beyond_reason_are_refused(tmp_path: Path, times: list[int], tick: int, reason: str) -> None:
    """A few bytes can claim that frames are weeks apart, or that a billion are shown in a second."""
    assert (
        reason_of(with_tick(write_clip(tmp_path / "a.mkv", [grey(n) for n in range(3)], times=times), tick)) == reason
    )


def test_a_rate_is_a_fraction_of_small_numbers(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", [grey(n) for n in range(3)], times=[0, 1001, 1999])
    (facts,) = probe(media_of(with_tick(path, 10_000_019)))
    assert facts.fps.denominator <= 1_000_000
    assert facts.fps == pytest.approx(2 / (1999 * 10_000_019e-9), rel=1e-6)


def test_a_files_version_follows_its_content_and_not_its_time_or_place(tmp_path: Path) -> None:
    first, copy, tar = tmp_path / "a", tmp_path / "b", tmp_path / "c.tar"
    content = bytes(range(256)) * 1024
    first.write_bytes(content)
    copy.write_bytes(content)
    tar.write_bytes(bytes(512) + content + bytes(512))
    version = file_version(media_of(first))
    assert file_version(media_of(copy)) == version
    assert file_version(Media(url=str(tar), offset=512, size=len(content))) == version
    for changed in (content[:-1] + b"!", b"!" + content[1:], content + b"!"):
        copy.write_bytes(changed)
        assert file_version(media_of(copy)) != version


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no video", "not_a_video"), (bytes(100_000), "not_a_video")],
)
def test_a_file_that_is_no_video_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert reason_of(path) == reason


def test_what_is_missing_or_no_file_is_refused_with_its_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    assert reason_of(tmp_path / "none.mp4") == "missing"
    assert reason_of(tmp_path) == "not_a_file"
    assert reason_of(tmp_path / "fifo.mp4") == "not_a_file"


def test_a_file_with_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.nut"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        target.mux(stream.encode(frame))
        target.mux(stream.encode())
    assert reason_of(path) == "no_video_stream"


def test_names_of_every_kind_are_read(make_clip: ClipMaker, tmp_path: Path) -> None:
    content = make_clip().read_bytes()
    for name in (
        b"with\nnewline.mkv",
        b"\xff\xfe.mkv",
        b"concat:a|b.mkv",
        b"per%03dcent.mkv",
        b"-i.mkv",
        "ü.mkv".encode(),
    ):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.write_bytes(content)
        assert probe(media_of(path))[0].num_frames == 20


def test_an_error_of_reading_says_nothing_of_the_clip(make_clip: ClipMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may pass, and the clip is tried again."""

    class Dropped:
        def read(self, size: int) -> bytes:
            raise ConnectionResetError(104, "connection reset by peer")

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

        def __enter__(self) -> "Dropped":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(container, "open_source", lambda media: Dropped())
    with (
        pytest.raises(MediaError) as refused,
        container.open_container(Media(url="https://127.0.0.1:1/clip.mp4")),
    ):
        pass
    assert refused.value.transient
