"""Where the time of a step goes: the modules' own time by events of the GPU, forward, backward and computed again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from train.peak import synchronize

PARTS = ("space", "time", "full", "captions", "mlp", "optimiser", "rest", "encoders", "data wait")
"""Attention with its projections counts as a part; the rest is norms, modulation, sums, embeddings and the loss."""

_PART_OF = {
    "SpaceAttention": "space",
    "TimeAttention": "time",
    "FullAttention": "full",
    "CrossAttention": "captions",
    "Mlp": "mlp",
}

Mark = Any
"""A point in the device's work."""


class PartTimes:
    """Adds up what lies between marks, by part.

    Args:
        device: Whose work is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark, Mark]] = []

    def mark(self) -> Mark:
        """Returns the present point in the device's work."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Adds the work that is launched within to a part."""
        start = self.mark()
        yield
        self._spans.append((part, start, self.mark()))

    @contextmanager
    def of_modules(self, model: nn.Module) -> Iterator[None]:
        """Within it, every pass through an attention or an MLP is measured."""
        handles = []
        for module in model.modules():
            part = _PART_OF.get(type(module).__name__)
            if part is not None:
                open_marks: list[Mark] = []
                before, after = self._hooks(part, open_marks)
                handles += [
                    module.register_forward_pre_hook(before),
                    module.register_forward_hook(after),
                    module.register_full_backward_pre_hook(before),
                    module.register_full_backward_hook(after),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, part: str, open_marks: list[Mark]) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: object) -> None:
            open_marks.append(self.mark())

        def after(*_: object) -> None:
            self._spans.append((part, open_marks.pop(), self.mark()))

        return before, after

    def milliseconds(self) -> dict[str, float]:
        """Returns the milliseconds of each part that occurred. Waits for the device."""
        synchronize(self._device)
        sums: dict[str, float] = {}
        for part, start, end in self._spans:
            sums[part] = sums.get(part, 0.0) + self.elapsed_ms(start, end)
        return sums

    def elapsed_ms(self, start: Mark, end: Mark) -> float:
        """Returns the milliseconds between two marks that the device has passed."""
        elapsed: float = (end - start) * 1000 if self._device.type != "cuda" else start.elapsed_time(end)
        return elapsed
