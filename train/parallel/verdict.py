"""Whether the weights took a step: known on the device when the step has run, and on the host when it asks."""

import torch
from torch import Tensor


class Verdict:
    """One step's.

    Args:
        taken: () float32, 1 or 0, on the device that took the step.
        known: What it is, if the host knows.
    """

    def __init__(self, taken: Tensor, known: bool | None = None) -> None:
        self.taken = taken
        self.known = known
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None
        if known is None and taken.is_cuda:
            on_host = torch.empty((), dtype=taken.dtype, pin_memory=True)
            on_host.copy_(taken, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._copied = on_host, arrived

    @classmethod
    def of(cls, applied: bool, device: torch.device) -> "Verdict":
        """Returns a verdict that the host has."""
        return cls(torch.full((), float(applied), device=device), applied)

    def wait(self) -> bool:
        """Returns whether the step was taken. Waits until it has run, but for nothing that was launched after it."""
        if self.known is None:
            on_host = self.taken
            if self._copied is not None:
                on_host, arrived = self._copied
                arrived.synchronize()
                self._copied = None
            self.known = bool(on_host)
        return self.known
