"""What the demo made, to be looked at, and the proof that it learnt its captions.

A falling loss proves little. So every generated video is compared with every clip: it should lie nearest, in PSNR, to
the clip whose caption it was generated from.
"""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from PIL import Image

from shared.cache.dataset import Cache
from shared.cache.layout import LATENT_STREAM, TEXT_STREAM
from shared.cache.reader import StreamReader
from shared.encoders.vae import VideoAutoencoder
from shared.errors import run_entry_point
from shared.media.clip import Media, centre_window
from shared.media.probe import probe
from shared.media.quality import psnr
from shared.media.video import decode_window
from shared.spec import Bucket
from train.sampling.files import file_stem

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NEAREST_SHARE = 0.8
"""Of the generated videos, how many must lie nearest to their own clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturesConfig:
    """Draw overview.png and loss.png, and print which clip each generated video resembles."""

    cache: Path
    """The demo's cache."""
    run: Path
    """The demo's training run."""
    samples: Path
    """What train.sample wrote for the clips' first captions, with seed 0."""
    clips: Path
    """The folder of the clips."""
    output: Path
    """Where the pictures go."""
    look_bucket: str
    """The bucket whose reconstructions are shown."""
    train_bucket: str
    """The bucket that was trained on."""


def rows_of(cache: Cache, bucket: Bucket) -> list[dict[str, Any]]:
    """Returns a bucket's rows of the index, by source."""
    rows = cache.read_index().to_pylist()
    chosen = [row for row in rows if Bucket(row["num_frames"], row["height"], row["width"]) == bucket]
    return sorted(chosen, key=lambda row: row["source"])


def first_caption(row: dict[str, Any]) -> str:
    """Returns a sample's first caption."""
    caption: str = row[TEXT_STREAM]["captions"][0]["caption"]
    return caption


def original(row: dict[str, Any], clips: Path) -> np.ndarray:
    """Returns the frames (T, H, W, 3) of the clip itself that a sample was encoded from."""
    media = Media(url=str((clips / row["source"]).absolute()))
    num_frames = probe(media)[0].num_frames
    window = centre_window(num_frames, num_frames=row["num_frames"], interval=row["frame_interval"])
    return decode_window(media, None, window, Bucket(row["num_frames"], row["height"], row["width"]))


def generated(row: dict[str, Any], samples: Path) -> np.ndarray:
    """Returns the frames (T, H, W, 3) of the video that was generated from a row's first caption."""
    strip = np.asarray(Image.open(samples / f"{file_stem(first_caption(row), 0)}.png").convert("RGB"))
    return np.stack(np.split(strip, row["num_frames"], axis=1))


def draw_overview(rows: list[dict[str, Any]], columns: list[tuple[str, list[np.ndarray]]], path: Path) -> None:
    """Draws, for every clip, two frames of each column's video.

    Args:
        rows: Rows of the index, for the captions.
        columns: A title and a video (T, H, W, 3) for each row.
        path: The PNG.
    """
    figure, axes = plt.subplots(len(rows), 2 * len(columns), figsize=(3.2 * len(columns), 1.72 * len(rows)))
    for column, (title, videos) in enumerate(columns):
        for row, video in enumerate(videos):
            for part, frame in enumerate((video[0], video[-1])):
                axis = axes[row, 2 * column + part]
                axis.imshow(frame, interpolation="nearest")
                axis.set_axis_off()
            if row == 0:
                axes[0, 2 * column].set_title(title, loc="left", fontsize=9)
    for row, facts in enumerate(rows):
        caption = textwrap.shorten(first_caption(facts), 110, placeholder=" ...")
        axes[row, 0].text(0, -0.03, caption, transform=axes[row, 0].transAxes, fontsize=7, va="top")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.03, wspace=0.04, hspace=0.16)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_loss(metrics: Path, path: Path) -> None:
    """Draws the loss over the steps of a run."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axis.set(xlabel="step", ylabel="loss (mean since the last point)", yscale="log", title="Training loss")
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(config: PicturesConfig) -> int:
    """Draws the pictures and returns 0 if enough generated videos lie nearest to their own clip."""
    cache = Cache.open(config.cache)
    looks, trained = (rows_of(cache, Bucket.parse(name)) for name in (config.look_bucket, config.train_bucket))
    vae = VideoAutoencoder.load(cache.provenance[LATENT_STREAM]["model"])
    reader = StreamReader(cache.store)
    small = [original(row, config.clips) for row in trained]
    videos = [generated(row, config.samples) for row in trained]
    draw_overview(
        looks,
        [
            (f"clip, {config.look_bucket}", [original(row, config.clips) for row in looks]),
            (
                "its cached latent, decoded",
                [vae.decode(reader.latent(row[LATENT_STREAM]), row["num_frames"]) for row in looks],
            ),
            (f"clip, {config.train_bucket}", small),
            ("generated from its caption", videos),
        ],
        config.output / "overview.png",
    )
    draw_loss(config.run / "metrics.jsonl", config.output / "loss.png")
    print("PSNR in dB of each generated video (row) against each clip (column); the nearest is marked *\n")
    distances = np.array([[psnr(video, clip) for clip in small] for video in videos])
    nearest = distances.argmax(1)
    for index, row in enumerate(trained):
        cells = "  ".join(
            f"{value:5.1f}{'*' if place == nearest[index] else ' '}" for place, value in enumerate(distances[index])
        )
        print(f"  {row['source']:<20} {cells}")
    num_right = int((nearest == np.arange(len(trained))).sum())
    print(f"\n{num_right} of {len(trained)} generated videos lie nearest to their own caption's clip")
    print(f"Look at {config.output / 'overview.png'}, {config.output / 'loss.png'} and {config.samples}")
    return 0 if num_right >= NEAREST_SHARE * len(trained) else 1


def main() -> int:
    """Returns 1 if too few generated videos resemble their own clip."""
    return draw(tyro.cli(PicturesConfig, prog="python -m examples.demo_pictures"))


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug=True))
