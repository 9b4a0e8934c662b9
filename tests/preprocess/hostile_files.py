"""Files as strangers send them: damaged, lying, huge, or no files at all."""

import os
import random
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.shared.media.made_clips import write_clip

FAST = {"preset": "ultrafast", "qp": "20"}
NUM_CUTS, NUM_FLIPS = 50, 200
_BOMB_SIDE = 7_000
_MANY_FRAMES = 100_000


def cut_files(folder: Path, good: Path) -> None:
    """Cuts a clip at many places."""
    content = good.read_bytes()
    for number in range(NUM_CUTS):
        (folder / f"cut{number:03}{good.suffix}").write_bytes(content[: 1 + number * len(content) // NUM_CUTS])


def flipped_files(folder: Path, goods: list[Path]) -> None:
    """Flips some bits of clips, at many places."""
    rng = random.Random(7)
    for number in range(NUM_FLIPS):
        good = goods[number % len(goods)]
        content = bytearray(good.read_bytes())
        for _ in range(1 + number % 8):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / f"flip{number:03}{good.suffix}").write_bytes(content)


def audio_only(path: Path) -> None:
    """Writes a sound without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def one_frame(path: Path) -> None:
    """Writes a video of a single frame."""
    write_clip(path, [np.full((96, 96, 3), 128, np.uint8)], options=FAST)


def gradient(height: int, width: int, number: int) -> np.ndarray:
    """Returns a picture (H, W, 3) that changes in space and time."""
    across = np.linspace(0, 200, width, dtype=np.uint8)
    down = np.linspace(0, 40, height, dtype=np.uint8)[:, None]
    return np.stack([across + down, across // 2 + down, down + np.zeros_like(across) + 10 * number], axis=2)


def eight_k(path: Path) -> None:
    """Writes four frames of 7680x4320."""
    write_clip(path, [gradient(4320, 7680, number) for number in range(4)], options=FAST)


def small_twin(path: Path) -> None:
    """Writes what :func:`eight_k` does, at 384x216."""
    write_clip(path, [gradient(216, 384, number) for number in range(4)], options=FAST)


def bomb_of_pixels(path: Path) -> None:
    """Writes a small file whose frames take hundreds of megabytes each."""
    picture = np.zeros((_BOMB_SIDE, _BOMB_SIDE, 3), np.uint8)
    write_clip(path, [picture] * 4, codec="png", pix_fmt="rgb24", options={})


def bomb_of_frames(path: Path) -> None:
    """Writes a file of very many frames, a few bytes each."""
    picture = np.full((64, 64, 3), 128, np.uint8)
    write_clip(path, [picture] * _MANY_FRAMES, rate=1000, options={"preset": "ultrafast", "g": "1000000"})


def endless_clip(path: Path) -> None:
    """Writes a video that claims to last for centuries."""
    write_clip(
        path, [np.full((96, 96, 3), 8 * n, np.uint8) for n in range(4)], times=[0, 1, 2, 2**40], tick=Fraction(1)
    )


def make_all(folder: Path, clips: Path, port: int) -> dict[str, str | None]:
    """Makes them all.

    Args:
        folder: Where to; ``good.mp4`` is there too, whole.
        clips: The committed clips.
        port: Of 127.0.0.1, which nobody may reach.

    Returns:
        By name, why a clip is refused, or None if it must be encoded. Damaged ones, of which either may come, are
        missing.
    """
    good = folder / "good.mp4"
    shutil.copy(clips / "towers_teal.mp4", good)
    cut_files(folder, good)
    flipped_files(folder, [clips / "towers_teal.mp4", clips / "cloud_square.mkv", clips / "bird_portrait.mp4"])
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "local.m3u8": playlist.format(good),
        "local.mp4": playlist.format(good),
        "network.m3u8": playlist.format(f"http://127.0.0.1:{port}/a.ts"),
        "network.mp4": playlist.format(f"http://127.0.0.1:{port}/a.ts"),
        "concat.mp4": f"ffconcat version 1.0\nfile '{good}'\n",
        "words.mp4": "not a video",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "empty.mp4").write_bytes(b"")
    os.mkfifo(folder / "fifo.mp4")
    (folder / "folder.mp4").mkdir()
    shutil.copy(good, folder / "new\nline.mp4")
    shutil.copy(good, folder / "wrong.txt")
    shutil.copy(good, folder / "wrong.webm")
    Image.new("RGB", (96, 96)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.mp4")
    made: dict[str, Callable[[Path], None]] = {
        "audio.mp4": audio_only,
        "single.mp4": one_frame,
        "8k.mp4": eight_k,
        "small.mp4": small_twin,
        "pixels.mov": bomb_of_pixels,
        "frames.mp4": bomb_of_frames,
        "endless.mkv": endless_clip,
    }
    for name, make in made.items():
        make(folder / name)
    return {
        **dict.fromkeys(texts, "not_a_video"),
        **dict.fromkeys(
            ("good.mp4", "new\nline.mp4", "wrong.txt", "wrong.webm", "8k.mp4", "small.mp4", "frames.mp4"), None
        ),
        "empty.mp4": "empty",
        "fifo.mp4": "not_a_file",
        "folder.mp4": "not_a_file",
        "missing.mp4": "missing",
        "audio.mp4": "no_video_stream",
        "single.mp4": "too_short",
        "picture.mp4": "too_short",
        "endless.mkv": "too_long",
    }
