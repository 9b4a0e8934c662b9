"""Frames as files that people look at: an MP4, a GIF, a strip of frames, and strips of several clips."""

import hashlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from shared.stores.files import explained, make_folder, publish, temporary_path

Format = Literal["mp4", "gif", "png", "grid"]
VIDEO_FORMATS: tuple[Format, ...] = ("mp4", "gif", "png")
IMAGE_FORMATS: tuple[Format, ...] = ("png",)

STRIP_FRAMES = 8
"""Frames that a strip shows, from the first to the last."""


def file_stem(prompt: str, seed: int) -> str:
    """Returns a file name without extension for a prompt and a seed; other prompts or seeds have others."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "prompt"
    return f"{words}-{_digest(prompt)}-seed{seed}"


def grid_stem(prompts: Sequence[str], seed: int) -> str:
    """Returns the name of several prompts' grid, likewise."""
    return f"grid-{_digest(chr(0).join(prompts))}-seed{seed}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_video_files(
    frames: np.ndarray, folder: Path, stem: str, *, fps: float, formats: Sequence[Format] = VIDEO_FORMATS
) -> list[Path]:
    """Writes ``stem.mp4``, ``stem.gif`` and ``stem.png`` (a strip of frames), or some, and returns their paths.

    Args:
        frames: (T, height, width, 3) uint8; even sizes for MP4, as H.264 subsamples colours.
        folder: Made if it is missing.
        stem: See :func:`file_stem`.
        fps: Frames a second.
        formats: Which to write. A ``grid`` is not among what one clip has.
    """
    writers: dict[str, Callable[[Path], None]] = {
        "mp4": lambda path: _write_mp4(frames, path, fps),
        "gif": lambda path: _write_gif(frames, path, fps),
        "png": lambda path: _write_png(strip(frames), path),
    }
    return [_publish(writers[name], folder, f"{stem}.{name}") for name in dict.fromkeys(formats) if name in writers]


def strip(frames: np.ndarray) -> np.ndarray:
    """Returns some frames (height, width * n, 3) side by side, of frames (T, height, width, 3)."""
    shown = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    return np.concatenate(list(frames[shown]), axis=1)


def write_grid(strips: Sequence[np.ndarray], folder: Path, stem: str) -> Path:
    """Writes ``stem.png``, the strips of several clips of one size under each other, and returns its path."""
    return _publish(lambda path: _write_png(np.concatenate(list(strips)), path), folder, f"{stem}.png")


def _publish(write: Callable[[Path], None], folder: Path, name: str) -> Path:
    with explained(f"writing {name}", folder=folder):
        make_folder(folder)
        temporary = temporary_path(folder)
        write(temporary)
    publish(temporary, folder / name)
    return folder / name


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def _write_png(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, format="PNG")
