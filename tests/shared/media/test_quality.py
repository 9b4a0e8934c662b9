"""PSNR."""

import numpy as np
import pytest

from shared.media.quality import psnr


def test_psnr_is_that_of_the_definition() -> None:
    zeros, ones = np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)
    assert psnr(zeros, zeros) == float("inf")
    assert psnr(ones, zeros) == pytest.approx(48.13, abs=0.01)
