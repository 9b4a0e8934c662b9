"""Whose turn it is: threads that share one GPU launch their kernels one after another, in order of their tickets."""

import threading
from collections import deque
from types import TracebackType


class Turn:
    """A ticket; as a context manager it waits for its turn, and ends it."""

    def __init__(self, turns: "Turns") -> None:
        self._turns = turns

    def __enter__(self) -> None:
        with self._turns.changed:
            self._turns.changed.wait_for(lambda: self._turns.waiting[0] is self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Lets the next one go on; without effect on a turn that has ended."""
        with self._turns.changed:
            if self in self._turns.waiting:
                self._turns.waiting.remove(self)
                self._turns.changed.notify_all()


class Turns:
    """Gives out tickets."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Turn] = deque()

    def next(self) -> Turn:
        """Returns the next ticket."""
        with self.changed:
            turn = Turn(self)
            self.waiting.append(turn)
            return turn
