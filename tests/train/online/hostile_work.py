"""What tests have a pool's processes do."""

import json
import os
import signal
import sys
import time
from multiprocessing import reduction
from multiprocessing.connection import Connection
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


class Malice:
    """Runs code in whoever unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def answer_with_a_pickle(mark: Path) -> None:
    Connection(os.dup(int(sys.argv[1]))).send(("value", Malice(mark)))


def answer_with_less_memory_than_it_says(size: tuple[int, ...]) -> None:
    link = Connection(os.dup(int(sys.argv[1])))
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, 8)
    link.send_bytes(json.dumps(["array", size]).encode())
    reduction.send_handle(link, descriptor, os.getppid())


def answer_with_memory_that_can_shrink(size: tuple[int, ...]) -> None:
    link = Connection(os.dup(int(sys.argv[1])))
    descriptor = os.memfd_create("open")
    os.ftruncate(descriptor, int(np.prod(size)))
    link.send_bytes(json.dumps(["array", size]).encode())
    reduction.send_handle(link, descriptor, os.getppid())
