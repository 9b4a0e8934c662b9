"""Requests to end a run in order."""

import signal


class StopRequest:
    """Remembers SIGTERM, so that the trainer can finish its step, save, and end."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, _number: int, _frame: object) -> None:
        self.received = True
