"""Frames as files that people look at: an MP4, a GIF and a filmstrip."""

import hashlib
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from shared.stores.files import publish, temporary_path

FILMSTRIP_FRAMES = 8


def file_stem(prompt: str, seed: int) -> str:
    """Returns a file name without extension for a prompt and a seed; other prompts or seeds have others."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "prompt"
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}-seed{seed}"


def write_video_files(frames: np.ndarray, folder: Path, stem: str, *, fps: float) -> list[Path]:
    """Writes ``stem.mp4``, ``stem.gif`` and ``stem.png`` (a filmstrip) and returns their paths.

    Args:
        frames: (T, height, width, 3) uint8; even sizes, as H.264 subsamples colours.
        folder: Made if it is missing.
        stem: See :func:`file_stem`.
        fps: Frames a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, write in ((".mp4", _write_mp4), (".gif", _write_gif), (".png", _write_filmstrip)):
        temporary = temporary_path(folder)
        write(frames, temporary, fps)
        publish(temporary, folder / (stem + suffix))
        written.append(folder / (stem + suffix))
    return written


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


def _write_filmstrip(frames: np.ndarray, path: Path, _fps: float) -> None:
    shown = np.linspace(0, len(frames) - 1, min(FILMSTRIP_FRAMES, len(frames))).round().astype(int)
    Image.fromarray(np.concatenate(list(frames[shown]), axis=1)).save(path, format="PNG")
