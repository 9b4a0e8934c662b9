"""What a clip really is: read from its container, whatever the manifest says."""

import hashlib
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from shared.media.video import MediaError, media_error, open_media, presentation_times

_VERSION_BYTES = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Facts of one clip's first video stream."""

    version: str
    """Changes when the file does, see :func:`file_version`."""
    num_frames: int
    """Frames that are presented."""
    height: int
    """In pixels, as shown: after rotation."""
    width: int
    fps: Fraction
    """Average frame rate."""


def file_version(path: Path) -> str:
    """Returns a name for a file's content: its size and a hash of its first and last 64 KiB.

    Not its time stamps: a data set that is copied or cloned keeps its versions. Containers keep their tables at one
    of the two ends, so another content of equal size changes one of them.

    Raises:
        MediaError: if the file is missing, not a regular file, not readable or empty.
    """
    try:
        if path.exists() and not path.is_file():
            raise MediaError("not_a_file", f"{path} is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_VERSION_BYTES))
            file.seek(max(size - _VERSION_BYTES, 0))
            digest.update(file.read(_VERSION_BYTES))
    except FileNotFoundError:
        raise MediaError("missing", f"no file {path}") from None
    except OSError as error:
        raise MediaError("not_readable", f"{path}: {error.strerror}") from None
    if size == 0:
        raise MediaError("empty", f"{path} has 0 bytes")
    return f"{size}-{digest.hexdigest()[:16]}"


def probe(path: Path) -> Probe:
    """Returns the facts of a clip. Reads all packets and decodes one frame.

    Raises:
        MediaError: if it is missing, empty, not a video, or its first frame cannot be decoded.
    """
    version = file_version(path)
    try:
        times = presentation_times(path)
        with open_media(path) as container:
            stream = container.streams.video[0]
            frame = next(container.decode(stream), None)
            fps = stream.average_rate or stream.guessed_rate
    except av.FFmpegError as error:
        raise media_error(path, error, "not_a_video") from None
    if frame is None or not times:
        raise MediaError("no_frames", f"{path} has a video stream without frames")
    if not fps:
        raise MediaError("no_frame_rate", f"{path} tells no frame rate")
    upright = frame.rotation % 180 == 0
    return Probe(
        version=version,
        num_frames=len(times),
        height=frame.height if upright else frame.width,
        width=frame.width if upright else frame.height,
        fps=Fraction(fps),
    )
