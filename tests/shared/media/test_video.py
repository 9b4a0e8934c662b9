"""Decoding of windows: exactly the frames that are asked for, from whole and from broken files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shared.media import container, sources
from shared.media.clip import Media, TimeRange, Window, centre_window
from shared.media.probe import probe
from shared.media.refusal import MediaError
from shared.media.video import decode_window, presentation_times
from shared.spec import Bucket
from tests.conftest import ClipMaker
from tests.shared.media.made_clips import decoded, encode, grey, media_of, numbers, write_clip

REAL_CLIPS = ["towers_teal.mp4", "towers_night.webm", "bird_portrait.mp4", "rabbit_sound.mp4", "meadow.mpg"]


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 9])
def test_exactly_the_asked_frames_are_decoded(make_clip: ClipMaker, start: int, interval: int) -> None:
    frames = decoded(make_clip(num_frames=20), Window(start=start, interval=interval, num_frames=4))
    assert frames.shape == (4, 32, 32, 3)
    assert numbers(frames) == [start + k * interval for k in range(4)]


def test_the_window_lies_in_the_middle() -> None:
    assert centre_window(20, num_frames=4, interval=3) == Window(start=5, interval=3, num_frames=4)
    assert centre_window(16, num_frames=16, interval=1).start == 0


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(clips_folder: Path, name: str) -> None:
    """Also if what nobody refers to is left out on the way."""
    path = clips_folder / name
    (facts,) = probe(media_of(path))
    with av.open(str(path)) as opened:
        every = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    assert len(every) == facts.num_frames
    assert every[0].shape == (facts.height, facts.width, 3)
    for start in (0, 11, facts.num_frames // 2, facts.num_frames - 11):
        window = Window(start=start, interval=2, num_frames=6)
        frames = decode_window(media_of(path), None, window, Bucket(6, facts.height, facts.width))
        np.testing.assert_array_equal(frames, every[start::2][:6])


def test_a_clip_is_scaled_to_cover_and_cropped_to_its_centre(tmp_path: Path) -> None:
    """Left half black, right half white; a square of it keeps the edge in the middle."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 255
    path = write_clip(tmp_path / "halves.mkv", [pixels, pixels])
    for bucket in ("1x32x32", "1x48x48"):
        frame = decoded(path, Window(start=0, num_frames=1), bucket)[0]
        middle = frame.shape[1] // 2
        assert frame[:, : middle - 3].max() < 8
        assert frame[:, middle + 3 :].min() > 247


def test_a_flipped_window_is_mirrored_and_plain_memory(clips_folder: Path) -> None:
    media, bucket = media_of(clips_folder / "towers_teal.mp4"), Bucket(3, 64, 96)
    plain = decode_window(media, None, Window(start=5, num_frames=3), bucket)
    flipped = decode_window(media, None, Window(start=5, num_frames=3, flip=True), bucket)
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    assert flipped.flags.c_contiguous


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_a_window_by_time_takes_what_is_shown_then(tmp_path: Path, name: str) -> None:
    """Of a clip with a variable frame rate: a frame is shown until the next one."""
    times = [0, 40, 80, 500, 540, 1000, 1001, 1500, 1600, 3000]
    path = write_clip(tmp_path / name, [grey(number) for number in range(10)], times=times)
    assert numbers(decoded(path, Window(start=0, num_frames=12, fps=4))) == [0, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
    assert numbers(decoded(path, Window(start=1, num_frames=3, fps=25))) == [1, 2, 2]


def test_a_window_in_a_time_range_counts_from_the_ranges_first_frame(make_clip: ClipMaker) -> None:
    path = make_clip(num_frames=20, fps=10)
    assert numbers(decoded(path, Window(start=1, num_frames=2), time_range=TimeRange(start=0.45, end=1.0))) == [6, 7]
    by_time = Window(start=1, num_frames=2, fps=5)
    assert numbers(decoded(path, by_time, time_range=TimeRange(start=0.45, end=1.0))) == [7, 9]


@pytest.mark.parametrize(
    ("window", "time_range"),
    [
        (Window(start=0, num_frames=21), None),
        (Window(start=19, num_frames=2), None),
        (Window(start=0, num_frames=3, interval=10), None),
        (Window(start=0, num_frames=6), TimeRange(start=0.5, end=1.0)),
        (Window(start=0, num_frames=11, fps=5), None),
        (Window(start=0, num_frames=6, fps=10), TimeRange(start=0.5, end=1.0)),
        (Window(start=0, num_frames=1), TimeRange(start=9.0)),
    ],
)
def test_a_clip_with_too_few_frames_says_that_its_probe_is_outdated(
    make_clip: ClipMaker, window: Window, time_range: TimeRange | None
) -> None:
    path = make_clip(num_frames=20, fps=10)
    with pytest.raises(MediaError) as refused:
        decoded(path, window, time_range=time_range)
    assert refused.value.reason == "probe_outdated"


def test_frames_before_the_edit_list_are_no_frames(tmp_path: Path) -> None:
    """An MP4 with negative times hides what comes before 0."""
    path = write_clip(tmp_path / "clip.mp4", [grey(n) for n in range(10)], times=range(-300, 700, 100))
    assert probe(media_of(path))[0].num_frames == 7
    assert numbers(decoded(path, Window(start=0, num_frames=7))) == [3, 4, 5, 6, 7, 8, 9]


def test_frames_before_the_first_key_frame_are_no_frames(tmp_path: Path) -> None:
    """A recording that begins in the midst of a group of pictures: its first frames refer to what came before."""
    whole = write_clip(
        tmp_path / "whole.nut",
        [grey(number) for number in range(16)],
        codec="mpeg2video",
        options={"g": "6", "bf": "2", "b": "4000000"},
    )
    cut = tmp_path / "cut.nut"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        key = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        first = packets[key].pts
        assert min(packet.pts for packet in packets[key:]) < first
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in packets[key:]:
            packet.stream = stream
            target.mux(packet)
    (facts,) = probe(media_of(cut))
    shown = [number for number, time in enumerate(sorted(packet.pts for packet in packets)) if time >= first]
    assert facts.num_frames == len(shown) < 16
    assert numbers(decoded(cut, Window(start=0, num_frames=facts.num_frames))) == shown


def test_hidden_frames_are_no_frames(tmp_path: Path) -> None:
    """VP8 keeps pictures that are only referred to in packets of their own: here the fourth and the seventh."""
    whole = write_clip(tmp_path / "whole.webm", [grey(n) for n in range(10)], codec="libvpx", options={"b": "4000000"})
    hiding = tmp_path / "hiding.webm"
    with av.open(str(whole)) as source, av.open(str(hiding), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                content = bytearray(packet)
                content[0] &= 0xEF if number in (3, 6) else 0xFF
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    assert probe(media_of(hiding))[0].num_frames == 8
    assert numbers(decoded(hiding, Window(start=0, num_frames=8))) == [0, 1, 2, 4, 5, 7, 8, 9]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.h264", "libx264"), ("a.avi", "libx264"), ("a.flv", "libx264"), ("a.ts", "libx264"), ("a.mov", "libx264"),
        ("a.m2v", "mpeg2video"), ("a.avi", "mpeg4"), ("a.avi", "mjpeg"), ("a.webm", "libvpx"), ("a.mkv", "ffv1"),
        ("a.nut", "libx264"),
    ],
)  # fmt: skip
def test_every_container_gives_its_frames(tmp_path: Path, name: str, codec: str) -> None:
    """Those without times among them."""
    path = write_clip(
        tmp_path / name,
        [grey(number) for number in range(10)],
        codec=codec,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
        options={"qp": "0", "bf": "2", "g": "4"} if codec == "libx264" else {"b": "4000000"},
    )
    (facts,) = probe(media_of(path))
    assert facts.num_frames == 10
    assert facts.fps == (25 if name == "a.h264" else 10)  # which says nothing: 25 is FFmpeg's guess
    assert facts.duration == pytest.approx(10 / facts.fps, abs=0.05)
    assert numbers(decoded(path, Window(start=2, num_frames=3, interval=2))) == [2, 4, 6]


def test_a_member_of_a_tar_is_decoded_in_place(make_clip: ClipMaker, tmp_path: Path) -> None:
    path, tar = make_clip(), tmp_path / "with, odd name.tar"
    content = path.read_bytes()
    tar.write_bytes(bytes(512) + content + b"#EXTM3U" * 99)
    member = Media(url=str(tar), offset=512, size=len(content))
    assert probe(member) == probe(media_of(path))
    frames = decode_window(member, None, Window(start=3, num_frames=2), Bucket(2, 32, 32))
    assert numbers(frames) == [3, 4]


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_a_file_object_gives_the_frames_that_the_file_gives(
    clips_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As objects behind URLs are read."""
    media, window, bucket = media_of(clips_folder / name), Window(start=9, num_frames=3), Bucket(3, 64, 96)
    facts, frames = probe(media), decode_window(media, None, window, bucket)
    monkeypatch.setattr(container, "is_local", lambda media: False)
    assert probe(media) == facts
    np.testing.assert_array_equal(decode_window(media, None, window, bucket), frames)


def test_a_cover_picture_is_not_taken_for_the_video(tmp_path: Path) -> None:
    """Of a song with a picture of its album."""
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as opened:
        cover = opened.add_stream("mjpeg", rate=10)
        cover.height, cover.width, cover.pix_fmt = 64, 96, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = opened.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        encode(opened, cover, [grey(25)], [0], Fraction(1, 10))
        opened.mux(sound.encode(silence))
        opened.mux(sound.encode())
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].disposition & av.stream.Disposition.attached_pic
    with pytest.raises(MediaError) as refused:
        probe(media_of(path))
    assert refused.value.reason == "no_video_stream"


def test_the_first_of_several_video_streams_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as opened:
        streams = [opened.add_stream("libx264", rate=10, options={"qp": "0"}) for _ in range(2)]
        for stream, height in zip(streams, (64, 128), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, 96, "yuv420p"
        for stream, first in zip(streams, (0, 12), strict=True):
            pictures = [grey(first + number, stream.height) for number in range(8)]
            encode(opened, stream, pictures, range(8), Fraction(1, 10))
    assert probe(media_of(path))[0].height == 64
    assert numbers(decoded(path, Window(start=4, num_frames=2))) == [4, 5]


def test_frames_whose_size_changes_midway_are_each_scaled(tmp_path: Path) -> None:
    first = write_clip(tmp_path / "a.ts", [grey(n, 64, 96) for n in range(6)])
    second = write_clip(
        tmp_path / "b.ts", [grey(n, 160, 240) for n in range(6, 12)], times=range(6, 12), tick=Fraction(1, 10)
    )
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert numbers(decoded(both, Window(start=3, num_frames=6))) == [3, 4, 5, 6, 7, 8]


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
    assert probe(media_of(titled))[0].num_frames == 20
    assert numbers(decoded(titled, Window(start=3, num_frames=2))) == [3, 4]


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
        (facts,) = probe(media_of(cut))
        if facts.num_frames < bucket.num_frames:
            return
        window = Window(start=facts.num_frames - 4, num_frames=4)
        frames = decode_window(media_of(cut), None, window, bucket)
    except MediaError as error:
        assert error.reason in {"not_a_video", "not_decodable", "frames_missing", "no_frames", "no_video_stream"}
        assert not error.transient
    else:
        np.testing.assert_array_equal(frames, decode_window(media_of(whole), None, window, bucket))


def test_damaged_files_are_refused_or_decoded_and_nothing_else(clips_folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("towers_teal.mp4", "cloud_square.mkv", "meadow.mpg"):
        content = (clips_folder / name).read_bytes()
        for _ in range(8):
            damaged = bytearray(content)
            for place in random.integers(0, len(content), 20):
                damaged[place] ^= 1 << int(random.integers(8))
            path = tmp_path / name
            path.write_bytes(damaged)
            try:
                (facts,) = probe(media_of(path))
                frames = decoded(path, centre_window(facts.num_frames, num_frames=2, interval=1))
            except MediaError as error:
                assert error.reason
            else:
                assert frames.shape == (2, 32, 32, 3)


def test_presentation_times_are_seconds_from_the_first_frame(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", [grey(n) for n in range(4)], times=[500, 600, 1000, 1001])
    assert presentation_times(media_of(path)) == pytest.approx([0, 0.1, 0.5, 0.501])


@pytest.mark.parametrize("suffix", [".mkv", ".png"])
def test_what_lies_behind_a_url_is_fetched_once(
    make_clip: ClipMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = make_clip(num_frames=20)
    if suffix == ".png":
        path = tmp_path / "a.png"
        Image.fromarray(grey(3)).save(path)
    fetched: list[str] = []

    class OneObject:
        def __init__(self, url: str) -> None:
            self.url = url

        def read_if_smaller(self, limit: int) -> bytes:
            fetched.append(self.url)
            return path.read_bytes()

    monkeypatch.setattr(sources, "remote", OneObject)
    media, bucket = Media(url=f"https://127.0.0.1:1/clip{suffix}"), Bucket.parse("1x32x32")
    assert probe(media) == probe(media_of(path))
    assert len(fetched) == 1
    window = Window(start=0 if suffix == ".png" else 9, num_frames=1)
    frames = decode_window(media, None, window, bucket)
    assert (frames == decode_window(media_of(path), None, window, bucket)).all()
    assert len(fetched) == 2
