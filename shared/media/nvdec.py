"""Decoding on the GPU's video decoder, which PyAV's wheels can do as they are."""

from av.codec.hwaccel import HWAccel, HWDeviceType
from av.video.stream import VideoStream

_FORMATS = {"yuv420p", "yuvj420p", "yuv420p10le"}
"""What every generation of it decodes, as far as the codec has it at all; of H.264, 8 bits only."""
_LEAST_SIDE, _MOST_SIDE = 144, 4096


def nvdec_takes(stream: VideoStream) -> bool:
    """Returns whether NVDEC decodes such a stream; others are decoded on the CPU."""
    context = stream.codec_context
    configs = context.codec.hardware_configs
    return (
        any(config.is_supported and config.device_type == HWDeviceType.cuda for config in configs)
        and stream.pix_fmt in _FORMATS
        and not (context.name == "h264" and stream.pix_fmt == "yuv420p10le")
        and min(context.width, context.height) >= _LEAST_SIDE
        and max(context.width, context.height) <= _MOST_SIDE
    )


def nvdec() -> HWAccel:
    """Returns the decoder of the process's first CUDA device, in the CUDA context that torch uses too."""
    return HWAccel("cuda", allow_software_fallback=False, options={"primary_ctx": "1"})
