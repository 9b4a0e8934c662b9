"""Frames of clips, and below them what their cached latents decode to: a figure in dB says less than a look."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.stores.files import explained, make_folder, publish, temporary_path

_MOST_FRAMES = 8
"""Side by side, from the first to the last."""
_GAP = 4
"""White pixels between the rows."""


def picture(decoded: np.ndarray, original: np.ndarray | None) -> np.ndarray:
    """Returns a picture (rows, columns, 3) uint8: frames of the clip, if it is there, above those decoded.

    Args:
        decoded: (T, height, width, 3) uint8.
        original: The same.
    """
    shown = np.linspace(0, len(decoded) - 1, min(_MOST_FRAMES, len(decoded))).round().astype(int)
    rows = [np.concatenate(list(frames[shown]), axis=1) for frames in (original, decoded) if frames is not None]
    gap = np.full((_GAP, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([rows[0], *(part for row in rows[1:] for part in (gap, row))])


def write_picture(folder: Path, row: dict[str, Any], decoded: np.ndarray, original: np.ndarray | None) -> Path:
    """Writes the picture of a sample, and returns its path, which begins with the clip's name.

    Args:
        folder: Made if it is missing.
        row: Of the index.
        decoded: See :func:`picture`.
        original: Likewise.

    Raises:
        StoreError: It cannot be written.
    """
    words = re.sub(r"[^A-Za-z0-9]+", "-", Path(row["source"]).stem).strip("-")[:48] or "clip"
    name = f"{words}-{row['num_frames']}x{row['height']}x{row['width']}-{row['sample'][:8]}.png"
    with explained(f"writing {name}", folder=folder):
        make_folder(folder)
        temporary = temporary_path(folder)
        Image.fromarray(picture(decoded, original)).save(temporary, format="PNG")
        publish(temporary, folder / name)
    return folder / name
