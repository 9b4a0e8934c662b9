"""Decoding: the frames of a clip that a bucket asks for, resized and cropped. PyAV and Pillow only, no torch."""

from collections.abc import Sequence
from typing import BinaryIO, Literal

import av
import numpy as np
from av.video.stream import VideoStream

from shared.media.clip import Media, TimeRange, Window
from shared.media.container import MAX_SIDE, is_local, open_container, sane_aspect, shown_aspect, video_stream
from shared.media.fit import FrameFitter, fit_pixels
from shared.media.images import image_orientation, image_pixels, image_timeline, is_image, open_image
from shared.media.nvdec import nvdec, nvdec_takes
from shared.media.packets import PacketTimes, decoded_timeline, read_times
from shared.media.refusal import MediaError
from shared.media.sources import open_source
from shared.media.timeline import Timeline
from shared.media.untried import aspect_found, is_mp4, needs_no_trial, read_fixed_times
from shared.media.version import version_and_beginning
from shared.spec import Bucket
from shared.wording import counted

Device = Literal["cpu", "nvdec"]

_SKIPPING = {"h264", "hevc", "mpeg2video"}
"""Decoders that can be told, packet by packet, to leave out a frame that no other refers to."""


def presentation_times(media: Media) -> list[float]:
    """Returns when each frame of a clip is presented, in seconds from the first. Decodes nothing, as far as can be.

    Raises:
        MediaError: if the file cannot be read, or holds no video.
    """
    with open_source(media) as file:
        if is_image(file.read(16)):
            with open_image(media, file) as image:
                timeline = image_timeline(image)
        else:
            with open_container(media, file) as container:
                times = read_times(container, video_stream(container, media))
            timeline = times.timeline or decoded_timeline(media)
    return [float((time - timeline.times[0]) * timeline.tick) for time in timeline.times]


def decode_window(
    media: Media,
    time_range: TimeRange | None,
    window: Window,
    bucket: Bucket,
    *,
    device: Device = "cpu",
    version: str | None = None,
) -> np.ndarray:
    """Returns the window's frames in the bucket's size: (num_frames, height, width, 3), uint8, RGB.

    Frames are found by their exact times, after a seek to the key frame before the first. Each is turned upright,
    resized (bicubic, antialiased) so that it covers the bucket, and cropped to its centre.

    Args:
        media: The clip.
        time_range: The part of it that counts; None: all.
        window: Which frames of that part.
        bucket: The size; its number of frames does not matter.
        device: ``nvdec``: on the GPU's decoder, what it can; the rest, and resizing, on the CPU.
        version: What the file's is to be, as its probe found it; None: any.

    Raises:
        MediaError: if a frame cannot be decoded; ``probe_outdated`` if the clip has not the frames that are asked for,
            or another version.
        InputError: if the GPU's decoder is asked for and there is none.
    """
    with open_source(media) as file:
        if version is not None and (found := version_and_beginning(media, file)[0]) != version:
            raise MediaError("probe_outdated", f"{media} has version {found}: expected {version}, as it was probed")
        file.seek(0)
        if is_image(file.read(16)):
            return _image_frames(media, file, time_range, window, bucket)
        return _video_frames(media, file, time_range, window, bucket, device)


class _Taken:
    """The frames that a window takes, as they come."""

    def __init__(self, times: Sequence[int], bucket: Bucket, *, flip: bool) -> None:
        """Frames of these times are taken, one perhaps several times, mirrored if so."""
        self._flip = flip
        self.pixels = np.empty((len(times), bucket.height, bucket.width, 3), np.uint8)
        self.bucket = bucket
        self.first, self.last = times[0], times[-1]
        self._positions: dict[int, list[int]] = {}
        for position, time in enumerate(times):
            self._positions.setdefault(time, []).append(position)
        self.start()

    def start(self) -> None:
        """Waits for all of them, whatever came before."""
        self.wanted = set(self._positions)

    def put(self, time: int, pixels: np.ndarray) -> None:
        """Places the pixels of a wanted frame."""
        for position in self._positions[time]:
            self.pixels[position] = pixels[:, ::-1] if self._flip else pixels


def _taken(media: Media, timeline: Timeline, time_range: TimeRange | None, window: Window) -> list[int]:
    part = timeline.part(time_range)
    times = part.taken(window)
    if times is None:
        found = f"{counted(len(part.times), 'frame')} in {float(part.duration):.3f} s"
        raise MediaError("probe_outdated", f"{media} has {found}: expected those of {window}")
    return times


def _image_frames(
    media: Media, file: BinaryIO, time_range: TimeRange | None, window: Window, bucket: Bucket
) -> np.ndarray:
    with open_image(media, file) as image:
        timeline, orientation = image_timeline(image), image_orientation(image)
        taken = _Taken(_taken(media, timeline, time_range, window), bucket, flip=window.flip)
        for number, time in enumerate(timeline.times):
            if time in taken.wanted:
                taken.put(time, fit_pixels(orientation.apply(image_pixels(image, number)), bucket))
    return taken.pixels


def _video_frames(
    media: Media, file: BinaryIO, time_range: TimeRange | None, window: Window, bucket: Bucket, device: Device
) -> np.ndarray:
    if device == "nvdec" and (pixels := _frames_by_nvdec(media, file, time_range, window, bucket)) is not None:
        return pixels
    if (pixels := _frames_without_trial(media, file, time_range, window, bucket)) is not None:
        return pixels
    with open_container(media, file) as container:
        stream = video_stream(container, media)
        times = read_times(container, stream)
        timeline = times.timeline or decoded_timeline(media)
        taken = _Taken(_taken(media, timeline, time_range, window), bucket, flip=window.flip)
        complete = _decode_after_seeking(container, stream, taken, times)
    if not complete:
        with open_container(media, file) as container:
            complete = _decode(container, video_stream(container, media), taken, times)
    if not complete:
        raise MediaError(
            "frames_missing", f"{media}: not all of {counted(window.num_frames, 'frame')} could be decoded"
        )
    return taken.pixels


def _frames_by_nvdec(
    media: Media, file: BinaryIO, time_range: TimeRange | None, window: Window, bucket: Bucket
) -> np.ndarray | None:
    """Returns the frames as the GPU decodes them, or None.

    None is what NVDEC does not take, and what fails in any way: the CPU is to find out whether the clip is to blame.
    """
    accelerator = nvdec()
    try:
        with open_container(media, file, hwaccel=accelerator) as container:
            stream = video_stream(container, media)
            if not nvdec_takes(stream):
                return None
            return _frames(container, stream, read_times(container, stream), media, time_range, window, bucket)
    except MediaError:
        return None


def _frames_without_trial(
    media: Media, file: BinaryIO, time_range: TimeRange | None, window: Window, bucket: Bucket
) -> np.ndarray | None:
    """Returns the frames of a local MP4 whose first frame is not decoded twice, or None: of others, and of what fails.

    A decoder that was told less of the order of frames may lose some, and none of it is used then.
    """
    file.seek(0)
    if not is_local(media) or not is_mp4(file.read(16)):
        return None
    try:
        with open_container(media, file, trial=False) as container:
            stream = video_stream(container, media)
            if not needs_no_trial(container, stream) or (times := read_fixed_times(container, stream)) is None:
                return None
            return _frames(container, stream, times, media, time_range, window, bucket, tried=False)
    except MediaError:
        return None


def _frames(
    container: av.container.InputContainer,
    stream: VideoStream,
    times: PacketTimes,
    media: Media,
    time_range: TimeRange | None,
    window: Window,
    bucket: Bucket,
    *,
    tried: bool = True,
) -> np.ndarray | None:
    """Returns the frames after a seek, or None if not all are found by it."""
    if times.timeline is None:
        return None
    taken = _Taken(_taken(media, times.timeline, time_range, window), bucket, flip=window.flip)
    return taken.pixels if _decode_after_seeking(container, stream, taken, times, tried=tried) else None


def _decode_after_seeking(
    container: av.container.InputContainer,
    stream: VideoStream,
    taken: _Taken,
    times: PacketTimes,
    *,
    tried: bool = True,
) -> bool:
    """As :func:`_decode`, from the last key frame before what is wanted, if it is found."""
    if times.timeline is None:
        return False
    for seek in times.seeks_to(taken.first):
        container.seek(seek, stream=stream)
        if _decode(container, stream, taken, times, from_key=True, tried=tried):
            return True
    return False


def _decode(
    container: av.container.InputContainer,
    stream: VideoStream,
    taken: _Taken,
    times: PacketTimes,
    *,
    from_key: bool = False,
    tried: bool = True,
) -> bool:
    """Fills in the frames that are wanted; returns whether all appeared, and none on the way was damaged.

    Args:
        container: The file, standing somewhere before them.
        stream: Its video.
        taken: What is wanted.
        times: What the packets say; if not the times, the n-th frame is at n.
        from_key: Whether packets are passed over until a key frame comes, which must not come too late.
        tried: Whether the file was opened with a trial, and so says how its pixels are shown.
    """
    taken.start()
    counted = times.timeline is None
    fitter = FrameFitter(taken.bucket, float(shown_aspect(stream))) if tried else None
    skipping = not counted and stream.codec_context.name in _SKIPPING
    number = -1
    for packet in container.demux(stream):
        if from_key:
            if packet.pts is not None and packet.pts > taken.first and packet.is_keyframe:
                return False
            if not times.knows_key(packet):
                continue
            from_key = False
        if skipping:
            is_wanted = packet.pts is None or packet.pts in taken.wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        for frame in packet.decode():
            number += 1
            time = number if counted else frame.pts
            if frame.is_corrupt or time is None or max(frame.width, frame.height) > MAX_SIDE:
                return False
            if time in taken.wanted:
                taken.wanted.remove(time)
                if fitter is None:
                    fitter = FrameFitter(taken.bucket, float(sane_aspect(aspect_found(stream))))
                for fitted in fitter.add(time, frame):
                    taken.put(*fitted)
            if not taken.wanted and fitter is not None:
                for fitted in fitter.rest():
                    taken.put(*fitted)
                return True
            if time > taken.last:
                return False
    return False
