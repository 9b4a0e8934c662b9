"""How close frames are to others."""

import numpy as np


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of two uint8 arrays of one shape, over all their values."""
    assert frames.shape == reference.shape, (frames.shape, reference.shape)
    error = np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
