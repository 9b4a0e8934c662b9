"""A Ray head for the tests of this folder, and the command line as a user calls it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.ray_head import RayHead
from tests.s3 import MotoS3, S3Server

ROOT = Path(__file__).parents[2]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A small S3, for all tests of a session."""
    with MotoS3() as server:
        yield server


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[RayHead]:
    """One Ray head, on loopback, for all tests of a session; its workers find the S3."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        with RayHead(tmp_path_factory.mktemp("ray") / "ray.log", num_cpus=2) as head:
            yield head


@pytest.fixture(scope="session")
def preprocess(ray_head: RayHead) -> Command:
    """Runs ``python -m preprocess`` on the tests' Ray head, from the checkout."""

    def run(*arguments: object, **more_environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "preprocess", *map(str, arguments)],
            cwd=ROOT,
            env=ray_head.environment | more_environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def verify() -> Command:
    """Runs ``python -m preprocess.verify``; it needs no Ray."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "preprocess.verify", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def demo_cache(preprocess: Command, clips_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed clips, encoded by one worker, two samples a shard. Tests copy it before they change it."""
    cache = tmp_path_factory.mktemp("demo") / "cache"
    result = preprocess(*demo_options(clips_folder, cache), "--workers", 1)
    assert result.returncode == 0, result.stderr
    return cache


def demo_options(clips_folder: Path, cache: Path) -> list[object]:
    """Returns the options by which tests encode the committed clips."""
    return [
        *("--preset", "demo", "--manifest", clips_folder / "clips.csv", "--output", cache),
        *("--buckets", "16x128x128", "4x64x64", "--buckets-per-clip", "all", "--shard-samples", 2),
    ]
