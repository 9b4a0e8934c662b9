"""A time limit for code that may never come back, such as a decoder that hangs in C."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer; where it hung is written to stderr."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
