"""What a clip really is: read from its container, whatever the manifest says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import BinaryIO

from av.video.stream import VideoStream

from shared.media.clip import Media, TimeRange
from shared.media.container import open_container, shown_aspect, video_stream
from shared.media.images import image_orientation, image_pixels, image_timeline, is_image, num_frames, open_image
from shared.media.orientation import frame_orientation
from shared.media.packets import PacketReader, decoded_timeline
from shared.media.refusal import MediaError
from shared.media.sources import open_source
from shared.media.timeline import Timeline
from shared.media.version import version_and_beginning
from shared.wording import counted

_STILL_RATE = Fraction(1)
_RATE_TOLERANCE = 0.05
_RATES = (Fraction(1, 1000), Fraction(100_000))
"""Frames a second, the least and the most that are believed."""
_RATE_DENOMINATOR = 1_000_000
_MOST_SECONDS = 1_000_000
_MOST_FRAMES = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Facts of one clip, or of a time range of it."""

    version: str
    """Changes when the file does, see :func:`file_version`."""
    num_frames: int
    """Frames that are presented in the range; 0 if there are none."""
    height: int
    """In pixels, as shown: upright and with square pixels."""
    width: int
    fps: Fraction
    """Average frame rate of the file; 1 of an image."""
    duration: float
    """Seconds from the range's first frame until its last is shown no more."""
    rotation: int
    """Degrees clockwise by which it is turned to stand upright: 0, 90, 180 or 270."""
    is_image: bool
    codec: str
    """As FFmpeg calls it; of an image, its format: gif, jpeg, png, webp."""


def file_version(media: Media) -> str:
    """Returns a name for a file's content: its size and a hash of its first and last 64 KiB.

    Not its time stamps, nor where it lies: a data set that is copied or cloned keeps its versions. Containers keep
    their tables at one of the two ends, so another content of equal size changes one of them.

    Raises:
        MediaError: if the file is missing, not a regular file, not readable or empty.
    """
    with open_source(media) as file:
        return version_and_beginning(media, file)[0]


def probe(media: Media, ranges: Sequence[TimeRange | None] = (None,)) -> list[Probe]:
    """Returns the facts of a clip for each of its time ranges. Reads all packets once and decodes one frame.

    Raises:
        MediaError: if it is missing, empty, not a video, too large or long, of a rate that cannot be, or its first
            frame cannot be decoded.
    """
    with open_source(media) as file:
        version, beginning = version_and_beginning(media, file)
        probe_kind = _probe_image if is_image(beginning) else _probe_video
        timeline, whole = probe_kind(media, file, version)
    parts = [timeline.part(time_range) for time_range in ranges]
    return [replace(whole, num_frames=len(part.times), duration=float(part.duration)) for part in parts]


def _probe_image(media: Media, file: BinaryIO, version: str) -> tuple[Timeline, Probe]:
    with open_image(media, file) as image:
        orientation = image_orientation(image)
        height, width = image_pixels(image, 0).shape[:2]
        timeline = _checked(media, image_timeline(image))
        still = num_frames(image) == 1
        facts = Probe(
            version=version,
            num_frames=len(timeline.times),
            height=width if orientation.lies else height,
            width=height if orientation.lies else width,
            fps=_STILL_RATE if still else _believed(media, len(timeline.times) / timeline.duration),
            duration=float(timeline.duration),
            rotation=orientation.quarter_turns * 90,
            is_image=still,
            codec={"MPO": "jpeg"}.get(image.format or "", (image.format or "").lower()),
        )
    return timeline, facts


def _probe_video(media: Media, file: BinaryIO, version: str) -> tuple[Timeline, Probe]:
    with open_container(media, file) as container:
        stream = video_stream(container, media)
        reader, frame = PacketReader(stream), None
        for packet in reader.packets(container, stream):
            if frame is None:
                frame = next(iter(packet.decode()), None)
        timeline = reader.times().timeline
        if timeline is None:
            timeline = decoded_timeline(media)
        if frame is None or not timeline.times:
            raise MediaError("no_frames", f"{media} has a video stream without frames")
        fps = _frame_rate(media, stream, _checked(media, timeline))
        orientation = frame_orientation(frame)
        height, width = frame.height, max(round(frame.width * shown_aspect(stream)), 1)
        facts = Probe(
            version=version,
            num_frames=len(timeline.times),
            height=width if orientation.lies else height,
            width=height if orientation.lies else width,
            fps=fps,
            duration=float(timeline.duration),
            rotation=orientation.quarter_turns * 90,
            is_image=False,
            codec=stream.codec_context.codec.canonical_name,
        )
    return timeline, facts


def _frame_rate(media: Media, stream: VideoStream, timeline: Timeline) -> Fraction:
    """Returns what the container says, unless the frames' own times are far from it."""
    said, found = stream.average_rate or stream.guessed_rate, timeline.mean_rate
    if said and (found is None or abs(found / said - 1) <= _RATE_TOLERANCE):
        return _believed(media, Fraction(said))
    if found is None:
        raise MediaError("no_frame_rate", f"{media} tells no frame rate")
    return _believed(media, found)


def _believed(media: Media, rate: Fraction) -> Fraction:
    """Returns a frame rate of a denominator that can be stored; refuses one that cannot be."""
    least, most = _RATES
    if not least <= rate <= most:
        raise MediaError("no_frame_rate", f"{media}: {float(rate):.3g} frames a second: expected 1/1000 .. {most}")
    return rate.limit_denominator(_RATE_DENOMINATOR)


def _checked(media: Media, timeline: Timeline) -> Timeline:
    """Returns a timeline; refuses one that is too long for places in it to be counted."""
    if len(timeline.times) > _MOST_FRAMES or timeline.duration > _MOST_SECONDS:
        found = f"{counted(len(timeline.times), 'frame')} in {float(timeline.duration):.3g} s"
        raise MediaError("too_long", f"{media}: {found}: expected at most {_MOST_SECONDS} s")
    return timeline
