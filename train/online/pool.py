"""Processes for work that may crash or hang: such a task costs a process, which is replaced, and nothing else.

Each process has one task at a time, so it is known which task ended it; that one is tried once more before it is given
up. A thread hands tasks out, so the processes stay busy while the trainer computes.
"""

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.errors import InputError
from train.online.answers import AnswerError, receive_answer

_ROOT = Path(__file__).parents[2]
_ATTEMPTS = 2
_END_SECONDS = 5.0


class TaskDiedError(Exception):
    """A task that ended its process, or raised what is not an :class:`InputError`, each time that it was tried."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Task:
    work: Callable[[Any], Any]
    argument: Any
    future: "Future[Any]"
    attempts: int = 0


class _Process:
    """One worker process."""

    def __init__(self, timeout_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "train.online.worker", str(theirs.fileno()), str(timeout_seconds)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.link = Connection(ours.detach())
        self.task: _Task | None = None

    def start(self, task: _Task) -> None:
        """Has a task done; a process that is gone already is found out when it is waited for."""
        self.task = task
        task.attempts += 1
        with suppress(OSError):
            self.link.send((task.work, task.argument))

    def end(self) -> int:
        """Ends it, and returns its exit code."""
        self.link.close()
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class ProcessPool:
    """Runs functions of modules in processes. Use it in ``with``.

    Args:
        num_workers: Processes, at least 1.
        timeout_seconds: A task that takes longer ends its process.
    """

    def __init__(self, *, num_workers: int, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[_Task] = deque()
        self._lock = threading.Lock()
        self._wake_up, self._woken = os.pipe()[::-1]
        self._closing = False
        self._processes = [_Process(timeout_seconds) for _ in range(num_workers)]
        self._thread = threading.Thread(target=self._hand_out, name="online-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, work: Callable[[Any], Any], argument: Any) -> "Future[Any]":
        """Returns the future of ``work(argument)``, which is a uint8 array or JSON values: no more comes back from a
        process that touched clips. It raises an :class:`InputError` of the work, or :class:`TaskDiedError`."""
        task = _Task(work=work, argument=argument, future=Future())
        with self._lock:
            self._waiting.append(task)
        os.write(self._wake_up, b"x")
        return task.future

    def close(self) -> None:
        """Ends the processes; what is not done stays undone."""
        if self._closing:
            return
        self._closing = True
        os.write(self._wake_up, b"x")
        self._thread.join()
        for process in self._processes:
            process.end()
        os.close(self._wake_up)
        os.close(self._woken)

    def _hand_out(self) -> None:
        while not self._closing:
            for process in self._processes:
                while process.task is None and (task := self._next()) is not None:
                    if task.future.set_running_or_notify_cancel():
                        process.start(task)
            links: list[Any] = [process.link for process in self._processes if process.task is not None]
            for ready in wait([*links, self._woken]):
                if ready == self._woken:
                    os.read(self._woken, 1 << 16)
                    continue
                number = next(n for n, process in enumerate(self._processes) if process.link is ready)
                self._take(number)

    def _next(self) -> _Task | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _take(self, number: int) -> None:
        """Takes the answer of a process, or replaces it."""
        process = self._processes[number]
        task, process.task = process.task, None
        assert task is not None
        try:
            kind, value = receive_answer(process.link)
        except (EOFError, OSError, AnswerError) as error:
            code = process.end()
            self._processes[number] = process = _Process(self._timeout_seconds)
            lost = f"gave no answer ({error})" if isinstance(error, AnswerError) else f"ended with code {code}"
            kind, value = "error", f"its process {lost}"
        match kind:
            case "value":
                task.future.set_result(value)
            case "input":
                task.future.set_exception(InputError(value))
            case _ if task.attempts < _ATTEMPTS:
                process.start(task)
            case _:
                task.future.set_exception(TaskDiedError(value))
