"""What tests have a pool's processes do."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from shared.errors import InputError


def double(number: int) -> int:
    return 2 * number


def ramp(size: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(size)).astype(np.uint8).reshape(size)


def crash(marks: Path) -> None:
    (marks / f"{time.monotonic_ns()}").touch()
    os.abort()


def crash_once(mark: Path) -> str:
    if mark.exists():
        return "recovered"
    mark.touch()
    os.abort()


def hang(_: int) -> None:
    time.sleep(600)


def fail(_: int) -> None:
    raise RuntimeError("a decoder's own error")


def refuse(_: int) -> None:
    raise InputError("no such decoder")


def signal_self(_: int) -> int:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
    return os.getpid()
