"""``python -m train.online.worker``: a process that touches clips, so that what crashes or hangs it ends nothing else.

Free of torch, so that one is started in a moment. ``train.online.pool`` starts it and talks to it over a socket.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection

from shared.clips.deadline import deadline
from shared.errors import InputError
from train.online.answers import send_answer
from train.stop import SIGNALS

_GRACE_SECONDS = 10
"""A scheduler sends its signal to every process of a job; the trainer may still wait for clips of its last step."""


def serve(link: Connection, timeout_seconds: float) -> None:
    """Answers tasks, each a function and its argument, until the other end is closed.

    Tasks come pickled, from the trainer; answers go as :mod:`train.online.answers` has them. A task that takes longer
    than the time-out ends the process.
    """
    while True:
        work, argument = link.recv()
        try:
            with deadline(timeout_seconds):
                result = work(argument)
        except InputError as error:
            send_answer(link, "input", str(error))
        except Exception as error:  # whatever a hostile clip brings about costs that clip alone
            send_answer(link, "error", f"{type(error).__name__}: {error}")
        else:
            send_answer(link, "value", result)


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
