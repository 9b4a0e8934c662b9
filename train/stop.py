"""Requests to end a run in order, and what its exit code then is."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job: SIGTERM, or what Slurm's ``--signal`` names."""

STOPPED = 75
"""The exit code of a run that saved and ended at a signal before its last step: EX_TEMPFAIL, run it again to go on."""


class StopRequest:
    """Remembers one of the :data:`SIGNALS`, or a first Ctrl-C, so that the trainer can finish its step, save, and end.

    A second Ctrl-C ends it at once, without saving.
    """

    def __init__(self) -> None:
        self.received = False
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
