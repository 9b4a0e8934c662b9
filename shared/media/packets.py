"""The times of a video stream's frames, from its packets, without decoding them."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
from av.packet import Packet
from av.video.stream import VideoStream

from shared.media.clip import Media
from shared.media.container import open_container, video_stream
from shared.media.refusal import MediaError
from shared.media.timeline import Timeline

_VP8_SHOWN = 0x10
"""The bit of a VP8 frame's first byte; without it, the frame is only referred to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PacketTimes:
    """What the packets of a stream say."""

    timeline: Timeline | None
    """None: some carry no time."""
    key_times: tuple[int, ...]
    """When the key frames are presented, ascending, in ticks."""
    key_seeks: tuple[int, ...]
    """For each of them, the time by which the container finds it."""
    key_bytes: tuple[int, ...]
    """The size of each."""

    def seeks_to(self, time: int) -> tuple[int, ...]:
        """Returns by which times to look for the last key frame that is presented at ``time`` or before.

        The second, if there are two, finds it too where a container's search ends behind what was asked for.
        """
        index = bisect_right(self.key_times, time) - 1
        return self.key_seeks[max(index - 1, 0) : index + 1][::-1]

    def knows_key(self, packet: "Packet[VideoStream]") -> bool:
        """Returns whether a packet that comes after a seek is one of the key frames, whole and at its time.

        MPEG program streams are entered in the middle of a frame: its rest takes the next one's time, and so on.
        """
        if packet.pts is None or not packet.is_keyframe:
            return False
        index = bisect_left(self.key_times, packet.pts)
        found = index < len(self.key_times) and self.key_times[index] == packet.pts
        return found and self.key_bytes[index] == packet.size


class PacketReader:
    """Gathers the times of packets as they come."""

    def __init__(self, stream: VideoStream) -> None:
        assert stream.time_base is not None
        self._tick = stream.time_base
        self._rate = stream.average_rate or stream.guessed_rate
        self._may_hide = stream.codec_context.name in ("vp8", "libvpx")
        self._times: set[int] = set()
        self._durations: dict[int, int] = {}
        self._keys: list[tuple[int, int, int]] = []
        self._damaged: list[Packet[VideoStream]] = []
        self._untimed = False

    def packets(self, container: av.container.InputContainer, stream: VideoStream) -> Iterator["Packet[VideoStream]"]:
        """Yields a stream's packets, having taken their times; the last is empty.

        Damaged ones at the end are what is left of a file that was cut off, and not counted.
        """
        for packet in container.demux(stream):
            if packet.size and packet.is_corrupt:
                self._damaged.append(packet)
            elif packet.size:
                for taken in (*self._damaged, packet):
                    self._take(taken)
                self._damaged.clear()
            yield packet

    def _take(self, packet: "Packet[VideoStream]") -> None:
        if packet.pts is None:
            self._untimed = True
            return
        if packet.is_keyframe:  # also one before the edit list begins: frames may refer to it
            self._keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.size))
        if packet.is_discard or (self._may_hide and not bytes(packet)[0] & _VP8_SHOWN):
            return
        self._times.add(packet.pts)
        if packet.duration:
            self._durations[packet.pts] = packet.duration

    def times(self) -> PacketTimes:
        """Returns what all of the packets said.

        Frames before the first key frame refer to what is not in the file, and count as none.
        """
        keys = sorted(self._keys)
        first = keys[0][0] if keys else None
        times = sorted(time for time in self._times if first is None or time >= first)
        return PacketTimes(
            timeline=None if self._untimed else Timeline(times=times, end=self._end(times), tick=self._tick),
            key_times=tuple(time for time, _, _ in keys),
            key_seeks=tuple(seek for _, seek, _ in keys),
            key_bytes=tuple(size for _, _, size in keys),
        )

    def _end(self, times: list[int]) -> int:
        """Returns when the last frame is shown no more: by its duration, or as long as its neighbour, or one period."""
        if not times:
            return 0
        if times[-1] in self._durations:
            return times[-1] + self._durations[times[-1]]
        if len(times) > 1:
            return 2 * times[-1] - times[-2]
        period = 1 / Fraction(self._rate) if self._rate else Fraction(1)
        return times[-1] + max(round(period / self._tick), 1)


def read_times(container: av.container.InputContainer, stream: VideoStream) -> PacketTimes:
    """Returns the times of all of a stream's packets. The container stands at its end then.

    Raises:
        av.FFmpegError: if the file cannot be read.
    """
    reader = PacketReader(stream)
    for _ in reader.packets(container, stream):
        pass
    return reader.times()


def decoded_timeline(media: Media) -> Timeline:
    """Returns the times of a stream whose packets carry none: its frames follow each other at its frame rate.

    Decodes all of it: a packet need not hold a frame.

    Raises:
        MediaError: if it cannot be decoded, or tells no frame rate.
    """
    with open_container(media) as container:
        stream = video_stream(container, media)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise MediaError("no_times", f"{media} has frames without a time and tells no frame rate")
        count = sum(1 for _ in container.decode(stream))
    return Timeline(times=range(count), end=count, tick=1 / Fraction(rate))
