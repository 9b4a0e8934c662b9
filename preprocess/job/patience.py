"""What the driver itself asks of a store that may be throttled for a while."""

import time
from collections.abc import Callable
from typing import TypeVar

from shared.stores.store import StoreBusyError

T = TypeVar("T")

_ATTEMPTS = 8
_PAUSE_SECONDS = 15.0


def patiently(call: Callable[[], T]) -> T:
    """Returns what a call gives; a store that asks for patience is asked again, for some minutes.

    Raises:
        StoreBusyError: if it does not answer for so long.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return call()
        except StoreBusyError:
            time.sleep(_PAUSE_SECONDS)
    return call()
