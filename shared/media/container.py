"""Opens media files for FFmpeg, which may read that file and nothing else.

Data sets hold what strangers wrote. A playlist that is called clip.mp4 names other files and hosts, and FFmpeg would
read them. So only containers that hold their own media are taken, no protocol but that of the file itself is known, and
references inside QuickTime files are not followed.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import BinaryIO

import av
from av.codec.hwaccel import HWAccel
from av.stream import Disposition
from av.video.stream import VideoStream

from shared.media.clip import Media
from shared.media.refusal import MediaError
from shared.media.sources import media_error, open_source
from shared.media.urls import scheme_of

CONTAINERS = (
    "asf", "av1", "avi", "dv", "flv", "gxf", "h261", "h263", "h264", "hevc", "ivf", "m4v", "matroska", "mjpeg", "mov",
    "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu", "ogg", "rm", "vc1", "vvc", "wtv", "yuv4mpegpipe",
)  # fmt: skip
"""FFmpeg's names of the containers that are read. Playlists and the like (hls, dash, concat, sdp, imf) are none."""
MAX_SIDE = 16_384
"""Of a frame, in pixels."""
MAX_PIXELS = 2**27
"""Of a frame."""

_LEAST_ASPECT = Fraction(1, 4)
_BUFFER_BYTES = 256 * 1024
_OF_READING = {
    errno.EACCES, errno.EAGAIN, errno.ECONNREFUSED, errno.ECONNRESET, errno.EIO, errno.EMFILE, errno.ENETUNREACH,
    errno.ENFILE, errno.ENOENT, errno.ENOMEM, errno.ENOTDIR, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip
"""Errors that say nothing of what is in the file."""


def is_local(media: Media) -> bool:
    """Returns whether the media lies in a file of this machine."""
    return scheme_of(media.url) is None


def refusal(media: Media, error: Exception, reason: str) -> MediaError:
    """Returns the refusal for an error of FFmpeg or Pillow: ``reason``, unless the file could not be read at all.

    FFmpeg calls damage an I/O error too. So a local file of which it says that is read once more, without FFmpeg.
    """
    try:
        if isinstance(error, MediaError):
            return error
        if isinstance(error, av.FFmpegError):
            if error.errno in _OF_READING and is_local(media):
                with open_source(media) as file:
                    while file.read(_BUFFER_BYTES):
                        pass
        elif isinstance(error, OSError) and error.errno in _OF_READING:
            return media_error(str(media), error)
    except MediaError as found:
        return found
    except OSError as found:
        return media_error(str(media), found)
    return MediaError(reason, f"{media}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def open_container(
    media: Media, file: BinaryIO | None = None, *, hwaccel: HWAccel | None = None, trial: bool = True
) -> Iterator[av.container.InputContainer]:
    """Opens a media file for reading; titles and the like may be in any encoding.

    Local files, and members of local tars, are read by FFmpeg itself, others through a file object: ``file``, if it is
    open already.

    Args:
        media: The file.
        file: It, open.
        hwaccel: Where its video is decoded, if not on the CPU.
        trial: Whether FFmpeg decodes the first frames of each stream, to learn what the container does not say of it.

    Raises:
        MediaError: if the file cannot be read, or is no container of :data:`CONTAINERS`; also if reading it fails
            while it is open, or if ``hwaccel`` knows the codec of none of its streams.
    """
    container_options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "", "enable_drefs": "0"}
    with _named_or_opened(media, file) as (opened, protocols):
        try:
            container = av.open(
                opened,
                options={} if trial else {"skip_frame": "all"},  # read by the trial's decoders alone
                container_options={**container_options, "protocol_whitelist": protocols},
                metadata_errors="replace",
                buffer_size=_BUFFER_BYTES,
                hwaccel=hwaccel,
            )
        except av.ArgumentError:
            raise MediaError("not_a_video", f"{media}: not a container of a video: playlists are not read") from None
        except (av.FFmpegError, OSError, MediaError) as error:
            raise refusal(media, error, "not_a_video") from None
        except RuntimeError as error:
            if hwaccel is None:
                raise
            raise MediaError("not_decodable", f"{media}: {error}") from None
        with container:
            try:
                yield container
            except (av.FFmpegError, OSError) as error:
                raise refusal(media, error, "not_decodable") from None


@contextmanager
def _named_or_opened(media: Media, file: BinaryIO | None) -> Iterator[tuple[object, str]]:
    """Yields what FFmpeg opens, a name or a file object, and the protocols that it needs for that."""
    if not is_local(media):
        with open_source(media) if file is None else nullcontext(file) as opened:
            opened.seek(0)
            yield opened, ""
        return
    open_source(media).close()  # refuses what is missing, no regular file, or cut short
    if media.offset is None or media.size is None:
        yield f"file:{media.url}", "file"
    else:
        end = media.offset + media.size
        yield f"subfile,,start,{media.offset},end,{end},,:file:{media.url}", "file,subfile"


def video_stream(container: av.container.InputContainer, media: Media) -> VideoStream:
    """Returns the first video stream that is no cover picture; other streams are not read.

    Raises:
        MediaError: if there is none, it cannot be decoded, or its frames are larger than we take.
    """
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not streams:
        raise MediaError("no_video_stream", f"{media} has no video stream")
    chosen = streams[0]
    if chosen.codec_context is None:
        raise MediaError("not_decodable", f"{media}: no decoder for its video stream")
    for stream in container.streams:
        stream.discard = av.stream.Discard.default if stream is chosen else av.stream.Discard.all
    chosen.codec_context.thread_count = 1
    chosen.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    check_size(media, chosen.codec_context.width, chosen.codec_context.height)
    return chosen


def check_size(media: Media, width: int, height: int) -> None:
    """Refuses frames that are too large: a file of some bytes can claim gigabytes.

    Raises:
        MediaError: if so.
    """
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise MediaError("too_large", f"{media}: frames of {width}x{height}: expected at most {MAX_SIDE} a side")


def shown_aspect(stream: VideoStream) -> Fraction:
    """Returns how much wider than high a stream's pixels are shown; 1 where it does not say, or absurdly."""
    return sane_aspect(stream.sample_aspect_ratio)


def sane_aspect(aspect: Fraction | None) -> Fraction:
    """Returns an aspect of pixels, or 1 in place of none, or of an absurd one."""
    return Fraction(aspect) if aspect and _LEAST_ASPECT <= aspect <= 1 / _LEAST_ASPECT else Fraction(1)
