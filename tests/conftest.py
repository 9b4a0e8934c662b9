"""What all tests share: clips, and what those that need GPUs do without."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

CLIPS = Path(__file__).parent / "data" / "clips"

ClipMaker = Callable[..., Path]

_GPUS_NEEDED = {"gpu": 1, "multigpu": 2}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that is marked for more GPUs than there are, or for others."""
    needed = max((number for mark, number in _GPUS_NEEDED.items() if item.get_closest_marker(mark)), default=0)
    if not needed:
        return
    import torch  # tests of what decodes without it do not wait for its import

    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}")
    if item.get_closest_marker("hopper") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.fixture(scope="session")
def clips_folder() -> Path:
    """The committed clips."""
    return CLIPS


@pytest.fixture
def make_clip(tmp_path: Path) -> ClipMaker:
    """Writes a lossless clip whose every frame tells its own number: all pixels of frame n are grey 8 n + 10."""

    def make(name: str = "clip.mkv", *, num_frames: int = 20, height: int = 64, width: int = 96, fps: int = 24) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"qp": "0", "bf": "2", "g": "7"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.time_base = Fraction(1, fps)
            for number in range(num_frames):
                pixels = np.full((height, width, 3), 8 * number % 240 + 10, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path

    return make
