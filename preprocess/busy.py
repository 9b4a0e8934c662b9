"""When the encoders of a worker were at work: by events of the GPU, or by the clock on a CPU.

What is measured is also the worker's pulse: whatever begins or ends is a step.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from preprocess.timeline import Interval, Kind


class BusyClock:
    """Collects intervals without ever waiting for the GPU.

    Args:
        device: Where the encoders run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._lock = threading.Lock()
        self._done: list[Interval] = []
        self._num_steps = 0
        self._under_way: Counter[Kind] = Counter()
        self._open: deque[tuple[Kind, torch.cuda.Event, torch.cuda.Event]] = deque()
        if self._on_gpu:
            torch.cuda.synchronize(device)
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
            self._zero.synchronize()
        self._zero_time = time.time()

    def kernels(self, kind: Kind) -> Callable[[], AbstractContextManager[None]]:
        """Returns what is to be entered around the launch of an encoder's kernels."""
        return lambda: self._kernels(kind)

    def pulse(self) -> tuple[int, bool]:
        """Returns how many steps were made so far, and whether all that is under way is waiting for frames."""
        with self._lock:
            return self._num_steps, set(+self._under_way) == {"wait"}

    @contextmanager
    def _step(self, kind: Kind) -> Iterator[None]:
        with self._lock:
            self._num_steps += 1
            self._under_way[kind] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_steps += 1
                self._under_way[kind] -= 1

    @contextmanager
    def _kernels(self, kind: Kind) -> Iterator[None]:
        with self._step(kind):
            yield from self._launch(kind)

    def _launch(self, kind: Kind) -> Iterator[None]:
        if not self._on_gpu:
            with self.measure(kind):
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began = time.time()
        start.record()
        try:
            yield
        finally:
            end.record()
            with self._lock:
                self._open.append((kind, start, end))
                self._done.append(Interval(kind="launch", start=began, end=time.time()))

    @contextmanager
    def measure(self, kind: Kind) -> Iterator[None]:
        """Measures a block by the clock."""
        start = time.time()
        try:
            with self._step(kind):
                yield
        finally:
            with self._lock:
                self._done.append(Interval(kind=kind, start=start, end=time.time()))

    def take(self) -> list[Interval]:
        """Returns the intervals that ended since the last call; of kernels, those that the GPU has finished."""
        with self._lock:
            while self._open and self._open[0][2].query():
                kind, start, end = self._open.popleft()
                began = self._zero_time + self._zero.elapsed_time(start) / 1000
                ended = began + start.elapsed_time(end) / 1000
                self._done.append(Interval(kind=kind, start=began, end=ended))
            done, self._done = self._done, []
        return done
