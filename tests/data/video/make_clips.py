"""Writes the clips of this folder and what ffmpeg makes of them, by the ffmpeg that is named on the command line.

Seven frames of a committed clip, 96x72, in many formats. ``expected.npz`` holds the fourth frame of each as
``ffmpeg -pix_fmt rgb24`` decodes it, turned upright, and with square pixels.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCE = HERE.parent / "clips" / "towers_teal.mp4"
NUM_FRAMES = 7
LOOKED_AT = 3
X264, X265 = ("-c:v", "libx264", "-crf", "12"), ("-c:v", "libx265", "-crf", "14", "-x265-params", "log-level=none")
HDR = ("-colorspace", "bt2020nc", "-color_primaries", "bt2020", "-color_trc")
CLIPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "h264_unspecified.mp4": ("format=yuv420p", X264),
    "h264_bt709.mp4": ("scale=out_color_matrix=bt709,format=yuv420p", (*X264, "-colorspace", "bt709")),
    "h264_full_range.mp4": ("scale=out_range=pc,format=yuv420p", (*X264, "-color_range", "pc")),
    "h264_10_bit.mp4": ("scale=out_color_matrix=bt709,format=yuv420p10le", (*X264, "-colorspace", "bt709")),
    "h264_422.mkv": ("format=yuv422p", X264),
    "h264_444.mkv": ("format=yuv444p", X264),
    "h264_interlaced.mp4": ("format=yuv420p", (*X264, "-x264-params", "interlaced=1")),
    "hevc_pq.mp4": ("scale=out_color_matrix=bt2020,format=yuv420p10le", (*X265, *HDR, "smpte2084")),
    "hevc_hlg.mp4": ("scale=out_color_matrix=bt2020,format=yuv420p10le", (*X265, *HDR, "arib-std-b67")),
    "av1.mkv": ("format=yuv420p", ("-c:v", "libsvtav1", "-crf", "20")),
    "vp9.webm": ("format=yuv420p", ("-c:v", "libvpx-vp9", "-crf", "20", "-b:v", "0")),
    "vp8.webm": ("format=yuv420p", ("-c:v", "libvpx", "-b:v", "900k", "-auto-alt-ref", "1", "-lag-in-frames", "5")),
    "mpeg2.mpg": ("format=yuv420p", ("-c:v", "mpeg2video", "-q:v", "3")),
    "mpeg2.ts": ("format=yuv420p", ("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2")),
    "mpeg4.avi": ("format=yuv420p", ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2")),
    "prores.mov": ("format=yuv422p10le", ("-c:v", "prores_ks", "-profile:v", "0")),
    "anamorphic.mp4": ("format=yuv420p,setsar=4/3", X264),
}


def _ffmpeg(program: str, *arguments: str) -> bytes:
    return subprocess.run([program, "-v", "error", "-y", *arguments], capture_output=True, check=True).stdout


def main(program: str) -> None:
    """Writes clips and frames."""
    expected = {}
    for name, (filters, encoder) in CLIPS.items():
        path = str(HERE / name)
        chain = f"scale=96:72:flags=area,{filters}"
        _ffmpeg(program, "-i", str(SOURCE), "-frames:v", str(NUM_FRAMES), "-an", "-vf", chain, *encoder, path)
        # What is to be looked at, square: ffmpeg alone keeps odd pixels as they are.
        seen = f"select=eq(n\\,{LOOKED_AT})" + (",scale=128:72:flags=bicubic" if name == "anamorphic.mp4" else "")
        raw = _ffmpeg(program, "-i", path, "-vf", seen, "-frames:v", "1", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
        expected[name] = np.frombuffer(raw, np.uint8).reshape(72, -1, 3)
    np.savez_compressed(HERE / "expected.npz", **expected)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1])
