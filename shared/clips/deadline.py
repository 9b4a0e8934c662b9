"""A time limit for code that may never come back, such as a decoder that hangs in C."""

import faulthandler
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

_STDERR = 2
_GRACE_SECONDS = 10.0

T = TypeVar("T")


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer; where it hung is written to stderr."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class TimedOutError(Exception):
    """A call took too long. It goes on in its thread: the process has no better use than to end."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Returns what a call gives.

    A call that hangs so that nobody else in the process can run ends the process 10 s later; where it hung is written
    to stderr.

    Raises:
        TimedOutError: if it takes longer.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # whoever waits gets it
            answer.set_exception(error)

    with deadline(seconds + _GRACE_SECONDS):
        threading.Thread(target=run, daemon=True).start()
        try:
            error = answer.exception(seconds)
        except TimeoutError:
            raise TimedOutError(f"longer than {seconds:g} s") from None
        if error is not None:
            raise error
        return answer.result()
