"""Probing and decoding of real and of broken files."""

from pathlib import Path

import av
import numpy as np
import pytest

from shared.media.manifest import read_manifest
from shared.media.probe import file_version, probe
from shared.media.video import MediaError, Window, centre_window, decode_window, presentation_times
from shared.spec import Bucket
from tests.conftest import ClipMaker

REAL_CLIPS = ["towers_teal.mp4", "towers_night.webm", "bird_portrait.mp4", "rabbit_sound.mp4", "meadow.mpg"]


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Returns which frames of ``make_clip`` these are."""
    return [round((float(frame.mean()) - 10) / 8) for frame in frames]


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 9])
def test_exactly_the_asked_frames_are_decoded(make_clip: ClipMaker, start: int, interval: int) -> None:
    path = make_clip(num_frames=20)
    window = Window(start=start, interval=interval, num_frames=4)
    frames = decode_window(path, window, Bucket(4, 32, 32))
    assert frames.shape == (4, 32, 32, 3)
    assert frame_numbers(frames) == [start + k * interval for k in range(4)]


def test_the_window_lies_in_the_middle() -> None:
    assert centre_window(20, num_frames=4, interval=3) == Window(start=5, interval=3, num_frames=4)
    assert centre_window(16, num_frames=16, interval=1).start == 0


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(clips_folder: Path, name: str) -> None:
    path = clips_folder / name
    facts = probe(path)
    window = centre_window(facts.num_frames, num_frames=6, interval=2)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == facts.num_frames
    assert every[0].shape == (facts.height, facts.width, 3)
    frames = decode_window(path, window, Bucket(6, facts.height, facts.width))
    np.testing.assert_array_equal(frames, every[window.start :: 2][:6])


def test_a_clip_is_scaled_to_cover_and_cropped_to_its_centre(tmp_path: Path) -> None:
    """Left half black, right half white; a square of it keeps the edge in the middle."""
    path = tmp_path / "halves.mkv"
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    frame = decode_window(path, Window(start=0, interval=1, num_frames=1), Bucket(1, 32, 32))[0]
    assert frame[:, :14].max() < 8
    assert frame[:, 18:].min() > 247


def test_probing_finds_the_truth_of_every_real_clip(clips_folder: Path) -> None:
    for clip in read_manifest(clips_folder / "clips.csv").clips:
        if clip.source == "not_a_video.mp4":
            continue
        facts = probe(clip.path)
        assert facts.num_frames == len(presentation_times(clip.path)) >= 17
        assert min(facts.height, facts.width) >= 256
        assert 8 <= facts.fps <= 60


def test_a_files_version_follows_its_content_and_not_its_time(tmp_path: Path) -> None:
    first, copy = tmp_path / "a", tmp_path / "b"
    content = bytes(range(256)) * 1024
    first.write_bytes(content)
    copy.write_bytes(content)
    assert file_version(first) == file_version(copy)
    copy.write_bytes(content[:-1] + b"!")
    assert file_version(first) != file_version(copy)
    copy.write_bytes(b"!" + content[1:])
    assert file_version(first) != file_version(copy)
    copy.write_bytes(content + b"!")
    assert file_version(first) != file_version(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no video", "not_a_video"), (bytes(100_000), "not_a_video")],
)
def test_a_file_that_is_no_video_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError) as refused:
        probe(path)
    assert refused.value.reason == reason


def test_a_missing_file_and_a_folder_are_refused_with_their_reasons(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "none.mp4", "missing"), (tmp_path, "not_a_file")]:
        with pytest.raises(MediaError) as refused:
            probe(path)
        assert refused.value.reason == reason


def test_a_file_with_sound_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError) as refused:
        probe(path)
    assert refused.value.reason == "no_video_stream"


def test_a_title_in_another_encoding_does_not_matter(make_clip: ClipMaker, tmp_path: Path) -> None:
    whole = make_clip()
    titled = tmp_path / "titled.mkv"
    with av.open(str(whole)) as source, av.open(str(titled), "w") as target:
        target.metadata["title"] = "Caf*"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    titled.write_bytes(titled.read_bytes().replace(b"Caf*", b"Caf\xe9"))
    assert probe(titled).num_frames == 20
    frames = decode_window(titled, Window(start=3, interval=1, num_frames=2), Bucket(2, 32, 32))
    assert frame_numbers(frames) == [3, 4]


@pytest.mark.parametrize("name", REAL_CLIPS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_clip_is_refused_or_its_frames_are_whole(
    clips_folder: Path, tmp_path: Path, name: str, part: float
) -> None:
    """Whatever is left decodes to the very frames of the whole file, or is refused with a reason."""
    whole = clips_folder / name
    cut = tmp_path / name
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    bucket = Bucket(4, 64, 64)
    try:
        facts = probe(cut)
        if facts.num_frames < bucket.num_frames:
            return
        window = centre_window(facts.num_frames, num_frames=4, interval=1)
        frames = decode_window(cut, window, bucket)
    except MediaError as error:
        assert error.reason in {"not_a_video", "not_decodable", "frames_missing", "no_frames"}
    else:
        np.testing.assert_array_equal(frames, decode_window(whole, window, bucket))
