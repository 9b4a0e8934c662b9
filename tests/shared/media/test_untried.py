"""H.264 in MP4 is decoded without a trial, and its frames are those that come after one."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shared.media import video
from shared.media.clip import Media, Window
from shared.media.probe import probe
from shared.media.refusal import MediaError
from shared.media.sources import open_source
from shared.media.video import decode_window
from shared.spec import Bucket
from tests.shared.media.made_clips import grey, media_of, numbers, write_clip

BUCKET = Bucket(6, 64, 64)


def outcome(media: Media, window: Window) -> bytes | str:
    """Returns a window's frames, or why there are none."""
    try:
        return decode_window(media, None, window, BUCKET).tobytes()
    except MediaError as error:
        return str(error)


def without_trial(media: Media, window: Window) -> np.ndarray | None:
    """Returns the frames that need none, or None."""
    with open_source(media) as file:
        return video._frames_without_trial(media, file, None, window, BUCKET)


def both(media: Media, window: Window, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes | str, bytes | str]:
    """Returns what comes of a window as a job decodes it, and after a trial."""
    ours = outcome(media, window)
    with monkeypatch.context() as patch:
        patch.setattr(video, "is_mp4", lambda _: False)
        return ours, outcome(media, window)


@pytest.mark.parametrize("name", ["towers_teal.mp4", "rabbit_sound.mp4"])
def test_frames_of_real_clips_are_the_same_wherever_a_window_begins(
    clips_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = media_of(clips_folder / name)
    (facts,) = probe(media)
    for start in range(0, facts.num_frames - 11, 7):
        window = Window(start=start, interval=2, num_frames=6)
        ours, expected = both(media, window, monkeypatch)
        assert isinstance(expected, bytes)
        assert ours == expected, start
        assert without_trial(media, window) is not None


@pytest.mark.parametrize(
    "options", [{"bf": "0"}, {"bf": "8", "b_strategy": "0"}, {"bf": "3", "g": "5", "flags": "-cgop"}]
)
def test_frames_are_the_same_however_they_are_reordered(
    tmp_path: Path, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    media = media_of(write_clip(tmp_path / "clip.mp4", [grey(n) for n in range(24)], options={"qp": "0", **options}))
    for start in range(18):
        window = Window(start=start, num_frames=6)
        ours, expected = both(media, window, monkeypatch)
        assert ours == expected
        assert numbers(np.frombuffer(ours, np.uint8).reshape(6, 64, 64, 3)) == list(range(start, start + 6))


def test_an_aspect_that_the_container_does_not_tell_is_the_streams_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide(stream: av.video.stream.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    half = np.repeat(np.arange(96, dtype=np.uint8)[None, :, None] * 2, 64, 0).repeat(3, 2)
    path = write_clip(tmp_path / "clip.mp4", [half] * 6, prepare=wide)
    content = path.read_bytes()
    assert content.count(b"pasp") == 1
    path.write_bytes(content.replace(b"pasp", b"free"))
    window = Window(start=0, num_frames=6)
    found = without_trial(media_of(path), window)
    assert found is not None
    ours, expected = both(media_of(path), window, monkeypatch)
    assert ours == expected == found.tobytes()
    assert 25 < np.ptp(found[0, 32, :, 0].astype(int)) < 70  # a square is the middle third of a picture of 192 x 64


def test_parameters_on_the_way_ask_for_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"qp": "0", "x264-params": "repeat-headers=1:keyint=6"}
    media = media_of(write_clip(tmp_path / "clip.mp4", [grey(n) for n in range(20)], options=options))
    window = Window(start=9, num_frames=6)
    assert without_trial(media, window) is None
    ours, expected = both(media, window, monkeypatch)
    assert ours == expected
    assert isinstance(ours, bytes)


@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "libx264"), ("clip.mp4", "libx265"), ("clip.ts", "libx264")])
def test_other_streams_are_tried(tmp_path: Path, name: str, codec: str) -> None:
    path = write_clip(tmp_path / name, [grey(n) for n in range(8)], codec=codec, options={})
    window = Window(start=0, num_frames=6)
    assert without_trial(media_of(path), window) is None
    assert isinstance(outcome(media_of(path), window), bytes)


def test_a_damaged_clip_has_the_same_outcome(
    clips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, path = (clips_folder / "towers_teal.mp4").read_bytes(), tmp_path / "clip.mp4"
    window, found = Window(start=3, num_frames=6), set()
    for place in range(40, len(content), len(content) // 24):
        path.write_bytes(
            content[:place] + bytes(byte ^ 0x55 for byte in content[place : place + 16]) + content[place + 16 :]
        )
        ours, expected = both(media_of(path), window, monkeypatch)
        assert ours == expected, place
        found.add(type(ours))
    path.write_bytes(content[: len(content) // 2])
    ours, expected = both(media_of(path), window, monkeypatch)
    assert ours == expected
    assert bytes in found
