"""Decoding on the GPU's video decoder, which PyAV's wheels can do as they are."""

import ctypes
from functools import cache

import av
from av.codec.hwaccel import HWAccel
from av.video.stream import VideoStream

from shared.errors import InputError

_PROFILES: dict[str, frozenset[str | None]] = {
    "h264": frozenset({"Baseline", "Constrained Baseline", "Main", "High"}),
    "hevc": frozenset({"Main", "Main 10"}),
    "mpeg2video": frozenset({"Simple", "Main"}),
    "mpeg4": frozenset({"Simple Profile", "Advanced Simple Profile"}),
    "vp8": frozenset({None}),
    "vp9": frozenset({"Profile 0"}),
}
"""What every generation of it decodes, as far as it has the codec at all: 4:2:0 of 8 bits, of HEVC 10 bits too. By
profile, since a stream that is opened for the GPU does not tell its pixel format before a frame is decoded."""
_LIBRARY = "libnvcuvid.so.1"
"""Of the driver; without it, every clip would fail by itself."""
_LEAST_SIDE, _MOST_SIDE = 144, 4096


def nvdec_takes(stream: VideoStream) -> bool:
    """Returns whether NVDEC decodes such a stream; others are decoded on the CPU."""
    context = stream.codec_context
    return (
        context.profile in _PROFILES.get(context.name, ())
        and min(context.width, context.height) >= _LEAST_SIDE
        and max(context.width, context.height) <= _MOST_SIDE
    )


def nvdec() -> HWAccel:
    """Returns the decoder of the process's first CUDA device. A process that uses CUDA by torch cannot have it too.

    Raises:
        InputError: if there is none.
    """
    _held_device()
    return _accelerator()


@cache
def _held_device() -> HWAccel:
    """Keeps the device's context: it would end with the first clip, and making it again takes longer than a clip."""
    try:
        ctypes.CDLL(_LIBRARY)
        return _accelerator().create(av.Codec("h264", "r"))
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"device nvdec: {error.strerror or error}: expected a CUDA device and its video driver: use the device cpu"
        ) from None


def _accelerator() -> HWAccel:
    """FFmpeg waits for this context without spinning, and so refuses one that is there already and spins: torch's."""
    return HWAccel("cuda", allow_software_fallback=False, options={"primary_ctx": "1"})
