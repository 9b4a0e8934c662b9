"""What the tests of training share: a group of one rank, a small cache, a small run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.cache.dataset import Cache
from shared.spec import Bucket
from tests.train.synthetic_cache import write_cache
from train.config import TrainConfig
from train.parallel.ranks import Ranks, join_ranks

BUCKETS = {Bucket(2, 32, 32): 5, Bucket(3, 32, 48): 4}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other on a busy machine make these small models many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with join_ranks() as joined:
        yield joined


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write_cache(tmp_path_factory.mktemp("small") / "cache", BUCKETS)


@pytest.fixture
def small_config(small_cache: Cache, tmp_path: Path) -> TrainConfig:
    return TrainConfig.of(
        cache=small_cache.url,
        output=tmp_path / "run",
        model="stdit-ti/2",
        model_settings=("depth=2", "hidden_size=32", "num_heads=2"),
        batch_size=4,
        steps=6,
        lr=1e-3,
        ema_decay=0.9,
        log_every=1,
        num_workers=0,
        peak_tflops=1.0,
    )


@pytest.fixture
def nothing_loaded() -> None:
    """No library of FlashAttention 3.

    PyTorch keeps a library's operators for good, so none can stand in for them in a process that has loaded it.
    """
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        pytest.skip("the library itself is loaded")
