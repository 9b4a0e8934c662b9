"""``python -m train.online.worker``: a process that touches clips, so that what crashes or hangs it ends nothing else.

Free of torch, so that one is started in a moment. ``train.online.pool`` starts it and talks to it over a socket.
"""

import mmap
import os
import signal
import sys
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np

from shared.clips.deadline import deadline
from shared.errors import InputError
from train.stop import SIGNALS

_GRACE_SECONDS = 10
"""A scheduler sends its signal to every process of a job; the trainer may still wait for clips of its last step."""


def serve(link: Connection, timeout_seconds: float) -> None:
    """Answers tasks, each a function and its argument, until the other end is closed.

    An answer is ``("value", result)``; ``("array", shape)`` with a descriptor behind it, for uint8 arrays; ``("input",
    text)`` for an :class:`InputError`, ``("error", text)`` for any other. A task that takes longer than the time-out
    ends the process.
    """
    while True:
        work, argument = link.recv()
        try:
            with deadline(timeout_seconds):
                result = work(argument)
        except InputError as error:
            link.send(("input", str(error)))
        except Exception as error:  # whatever a hostile clip brings about costs that clip alone
            link.send(("error", f"{type(error).__name__}: {error}"))
        else:
            if isinstance(result, np.ndarray):
                _send_array(link, result)
            else:
                link.send(("value", result))


def _send_array(link: Connection, array: np.ndarray) -> None:
    assert array.dtype == np.uint8
    descriptor = os.memfd_create("latentmill-frames", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, array.nbytes)
        with mmap.mmap(descriptor, array.nbytes) as memory:
            np.copyto(np.frombuffer(memory, np.uint8).reshape(array.shape), array)
        link.send(("array", array.shape))
        reduction.send_handle(link, descriptor, os.getppid())
    finally:
        os.close(descriptor)


def main() -> None:
    """Serves the socket whose descriptor is the first argument, with the time-out (seconds) that is the second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    for number in SIGNALS:
        signal.signal(number, lambda *_: signal.alarm(_GRACE_SECONDS))
    try:
        serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)


if __name__ == "__main__":
    main()
