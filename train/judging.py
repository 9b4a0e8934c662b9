"""When a run is judged, and with which weights: evaluations and previews, between steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.ema import Ema
from train.evaluation import Evaluation
from train.held_out import FixedSamples
from train.memory_needs import need_of_evaluation, need_of_previews
from train.metrics import MetricsLog
from train.out_of_memory import Need, enough_memory
from train.parallel.ranks import Ranks, Result
from train.previews import Previews
from train.run_folder import write_durably
from train.setup import CheckedRun

PUT_OFF_FILE = "judge-after-step"
"""In a run's folder: the step after which it ended before it was judged, or is being judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Called:
    """A model as sampling knows it, computed by the engine around it."""

    engine: Callable[..., Tensor]
    config: Any
    wants_size: bool

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        return self.engine(*arguments, **named)


class Judge:
    """Evaluates and previews a run's model.

    Args:
        run: What is trained.
        ranks: All of them call every method.
        engine: DeepSpeed's.
        model: The module inside it.
        ema: Its average, if there is one.

    Raises:
        InputError: if no sample is held out, or the encoders that previews need cannot be found.
    """

    def __init__(self, run: CheckedRun, ranks: Ranks, *, engine: Any, model: nn.Module, ema: Ema | None) -> None:
        self._run, self._ranks, self._engine, self._model = run, ranks, engine, model
        options = run.config.evaluation
        self._ema = ema if options.judge_ema is not False else None
        self._evaluation: Evaluation | None = None
        self._previews: Previews | None = None
        if options.evaluate_every is not None:
            samples = ranks.agree(lambda: FixedSamples.open(run.config, options.evaluate_samples, held_out=True))
            self._evaluation = Evaluation(samples, run.objective, ranks, num_levels=options.evaluate_levels)
        if options.preview_every is not None:
            with _same_random_numbers(), enough_memory(need_of_previews(None, run.config), rank=ranks.rank):
                self._previews = Previews(run, ranks)

    def is_due(self, step: int) -> bool:
        """Whether anything is to be done after ``step`` steps."""
        return any(self._due(step))

    def put_off(self, step: int) -> bool:
        """Leaves what is due after ``step`` steps to the run that goes on from there; returns whether anything is."""
        due = self.is_due(step)
        if due:
            self._ranks.agree(lambda: self._remember(step))
        return due

    def catch_up(self, first_step: int, log: MetricsLog | None) -> None:
        """Does what a run that ended at ``first_step`` put off."""
        file = self._run.config.output / PUT_OFF_FILE
        if self._ranks.from_first(file.is_file() and file.read_bytes() == str(first_step).encode()):
            self.after(first_step, log)

    def after(self, step: int, log: MetricsLog | None) -> None:
        """Does what is due after ``step`` steps; the last step of a run has everything."""
        evaluate, preview = self._due(step)
        if not evaluate and not preview:
            return
        config, rank = self._run.config, self._ranks.rank
        with self._judged_weights(), _same_random_numbers():
            if evaluate and self._evaluation is not None:
                with enough_memory(need_of_evaluation(step, config), rank=rank):
                    values = self._evaluation.losses(self._engine, self._model)
                self._ranks.agree(lambda: None if log is None else log.write_evaluation(step, values))
            if preview and self._previews is not None:
                called = _Called(
                    engine=self._engine,
                    config=self._model.config,
                    wants_size=bool(getattr(self._model, "wants_size", False)),
                )
                make = partial(self._previews.make, step, called, () if log is None else log.boards)
                files = self._ranks.agree(partial(_with_memory, need_of_previews(step, config), rank, make))
                if self._ranks.is_first:
                    print(f"previews of step {step}: {files[0].parent}", flush=True)
        if self._ranks.is_first:
            (self._run.config.output / PUT_OFF_FILE).unlink(missing_ok=True)
        self._ranks.barrier()

    def _due(self, step: int) -> tuple[bool, bool]:
        """Returns whether an evaluation and previews are due."""
        options, last = self._run.config.evaluation, step == self._run.config.steps
        return _is_due(options.evaluate_every, step, last), _is_due(options.preview_every, step, last)

    def _remember(self, step: int) -> None:
        if self._ranks.is_first:
            write_durably(self._run.config.output / PUT_OFF_FILE, str(step).encode())

    @contextmanager
    def _judged_weights(self) -> Iterator[None]:
        self._engine.eval()
        try:
            with nullcontext() if self._ema is None else self._ema.applied():
                yield
        finally:
            self._engine.train()


def _with_memory(need: Need, rank: int, work: Callable[[], Result]) -> Result:
    with enough_memory(need, rank=rank):
        return work()


def _is_due(every: int | None, step: int, last: bool) -> bool:
    return every is not None and (last or step % every == 0)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leaves PyTorch's generators as they were: loading encoders draws from them."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
