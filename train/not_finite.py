"""What follows where a loss or a gradient is no finite number. The weights did not take that step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shared.cache.identity import identity_texts
from shared.errors import InputError
from shared.wording import counted
from train.config import OptimiserOptions
from train.data import Batch
from train.parallel.ranks import Ranks
from train.parallel.verdict import Verdict
from train.step import StepResult

_NAMED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What is kept of a step until it is looked at."""

    number: int
    identity: Tensor
    loss: Tensor
    verdict: Verdict


class NotFiniteGuard:
    """Stops the run, or lets it go on and counts.

    Steps are launched ahead of the device, so each is looked at when the next one has been launched, or when the
    trainer is about to say, judge or save something.

    Args:
        options: ``on_nan`` and ``max_nan_steps``.
        ranks: All of them call every method.
        sources: Gives the sources of samples by their identities; those that it does not know are left out.
        last_saved: Names the checkpoint that a run goes on from, or nothing.
    """

    def __init__(
        self,
        options: OptimiserOptions,
        ranks: Ranks,
        *,
        sources: Callable[[Sequence[str]], dict[str, str]],
        last_saved: Callable[[], str | None],
    ) -> None:
        self._options, self._ranks, self._sources, self._last_saved = options, ranks, sources, last_saved
        self._in_a_row = 0
        self._unsettled: _Step | None = None

    def check(self, step: int, batch: Batch, result: StepResult) -> None:
        """Takes a step in, and looks at the one before, which the device has had time for.

        Args:
            step: Counted from 1.
            batch: What this rank trained on.
            result: The same on all ranks in its verdict.

        Raises:
            InputError: at a step that was not applied, unless such are to be skipped and were not too many in a row.
        """
        self.settle()
        identity = batch.identity.clone()  # a batch that is kept keeps the loader's buffer
        self._unsettled = _Step(number=step, identity=identity, loss=result.terms.loss, verdict=result.verdict)
        if result.verdict.known is not None:
            self.settle()

    def settle(self) -> None:
        """Looks at the last step that was taken in, and waits for it. Raises likewise."""
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        if step.verdict.wait():
            self._in_a_row = 0
            return
        self._in_a_row += 1
        names = identity_texts(step.identity.numpy().view(np.uint64))
        found = [(n, loss) for n, loss in zip(names, step.loss.tolist(), strict=True) if not math.isfinite(loss)]
        everywhere = [each for part in self._ranks.gather(found) for each in part]
        self._ranks.agree(lambda: self._tell(step.number, everywhere))

    def _tell(self, step: int, found: list[tuple[str, float]]) -> None:
        if found:
            sources = self._sources([name for name, _ in found[:_NAMED]]) if self._ranks.is_first else {}
            named = ", ".join(f"{sources.get(name, name)} ({loss})" for name, loss in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            what = f"step {step}: the loss is no finite number for {named}{more}"
        else:
            what = f"step {step}: the losses are finite, and the gradient's norm is not"
        limit = self._options.max_nan_steps
        if self._options.on_nan == "skip" and self._in_a_row < limit:
            if self._ranks.is_first:
                print(f"{what}: left out, the weights stay as they were", flush=True)
            return
        rows = f", as in {counted(limit, 'step')} in a row" if self._options.on_nan == "skip" else ""
        raise InputError(
            f"{what}{rows}; the run goes on from {self._last_saved() or 'its beginning'}: lower --lr, add "
            "--warmup-steps, leave the samples out with --where, or let such steps be left out with --on-nan skip"
        )
