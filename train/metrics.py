"""What a run reports: losses, speed, and how much of the hardware's arithmetic it uses."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shared.stores.files import explained
from shared.wording import counted
from train.boards import Board
from train.data import Batch
from train.model.config import ModelConfig
from train.model.flops import training_flop
from train.parallel.ranks import Ranks
from train.peak import Peak, synchronize, utilisation
from train.run_folder import METRICS_FILE, write_durably
from train.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """The means of the steps since the line before, over all ranks."""

    step: int
    """Steps taken."""
    loss: float
    parts: dict[str, float]
    """What the loss is made of, by name."""
    grad_norm: float
    """Of the last step that was applied, before clipping."""
    lr: float
    samples_per_second: float
    tokens_per_second: float
    step_ms: float
    data_wait_ms: float
    """Of a step, on the rank that waited longest: until every rank has its batch, for they begin a step together. So it
    has the wait for the slowest rank's batch, and for a rank that comes late for another reason."""
    data_wait_fraction: float
    tflops_per_device: float
    """Model FLOP: three times the forward pass, recomputation not counted."""
    mfu: float
    peak_memory_gib: float
    """What PyTorch allocated at most on a GPU since the run began, on the rank that had most; 0 on CPUs."""
    nan_steps: int = 0
    """Steps since the line before whose loss or gradient was no finite number; losses are means over the others."""

    def values(self) -> dict[str, float]:
        """Returns all of it by name; the parts of the loss stand behind it."""
        values = asdict(self)
        parts = values.pop("parts")
        return {"step": values.pop("step"), "loss": values.pop("loss")} | parts | values

    def line(self, steps: int, seconds_left: float) -> str:
        """Returns the line for people.

        Args:
            steps: Of the whole run.
            seconds_left: Until it has taken them.
        """
        minutes, seconds = divmod(round(seconds_left), 60)
        return (
            f"step {self.step}/{steps} loss {self.loss:.4f} "
            f"({' '.join(f'{name} {value:.4f}' for name, value in self.parts.items())}) "
            f"grad {self.grad_norm:.3f} lr {self.lr:.2e} | {self.samples_per_second:.1f} samples/s "
            f"{self.tokens_per_second:.0f} tokens/s {self.step_ms:.0f} ms/step "
            f"data wait {self.data_wait_ms:.1f} ms ({100 * self.data_wait_fraction:.1f} %) | "
            f"{self.tflops_per_device:.3g} TFLOP/s a device, MFU {100 * self.mfu:.1f} %"
            + (f" | {counted(self.nan_steps, 'step')} left out" if self.nan_steps else "")
            + (f" | {minutes // 60}:{minutes % 60:02}:{seconds:02} left" if self.step < steps else "")
        )


class Totals:
    """What the steps since the last line of the log add up to, on one rank.

    Args:
        device: Of the losses.
        parts: The names of what the loss is made of.
    """

    def __init__(self, device: torch.device, parts: tuple[str, ...]) -> None:
        self.parts = parts
        self.losses = torch.zeros(1 + len(parts), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.num_applied = torch.zeros((), device=device)
        self.num_steps = 0
        self.samples = 0
        self.tokens = 0
        self.model_flop = 0.0
        self.wait_seconds = 0.0
        self.start = time.perf_counter()

    def add(self, result: StepResult, batch: Batch, config: ModelConfig, wait_seconds: float) -> None:
        """Takes one step in, without waiting for it."""
        terms, taken = result.terms, result.verdict.taken > 0
        means = torch.stack([terms.loss, *(terms.parts[name] for name in self.parts)]).mean(1)
        self.losses += torch.where(taken, means, 0)
        self.grad_norm = torch.where(taken, result.grad_norm.to(taken.device), self.grad_norm)
        self.num_applied += taken
        frames, rows, columns = config.grid(tuple(batch.latents.shape[2:]))  # type: ignore[arg-type]
        flop = training_flop(
            config,
            num_frames=frames,
            frame_tokens=rows * columns,
            caption_tokens=batch.caption_tokens,
        )
        self.num_steps += 1
        self.samples += len(batch)
        self.tokens += len(batch) * frames * rows * columns
        self.model_flop += len(batch) * flop
        self.wait_seconds += wait_seconds

    def metrics(self, *, step: int, lr: float, ranks: Ranks, peak: Peak) -> StepMetrics:
        """Returns the means over steps and ranks. All ranks call it."""
        synchronize(ranks.device)
        seconds = time.perf_counter() - self.start
        mine = [*(self.losses / self.num_applied).tolist(), self.samples, self.tokens, self.model_flop]
        loss, *parts, samples, tokens, model_flop = ranks.mean(torch.tensor(mine, dtype=torch.float64)).tolist()
        wait = ranks.maximum(self.wait_seconds)
        tflops, mfu = utilisation(model_flop * ranks.num_data_ranks, seconds, ranks.world_size, peak.tflops)
        return StepMetrics(
            step=step,
            loss=loss,
            parts=dict(zip(self.parts, parts, strict=True)),
            grad_norm=float(self.grad_norm),
            lr=lr,
            samples_per_second=samples * ranks.num_data_ranks / seconds,
            tokens_per_second=tokens * ranks.num_data_ranks / seconds,
            step_ms=1000 * seconds / self.num_steps,
            data_wait_ms=1000 * wait / self.num_steps,
            data_wait_fraction=wait / seconds,
            tflops_per_device=tflops,
            mfu=mfu,
            peak_memory_gib=ranks.maximum(_peak_memory_gib(ranks.device)),
            nan_steps=self.num_steps - int(self.num_applied),
        )


def _peak_memory_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


class MetricsLog:
    """Rank 0's log: a line for people, ``metrics.jsonl``, and what boards there are.

    Args:
        run: The run's folder.
        steps: Of the whole run.
        first_step: Where this process begins. Lines beyond it, of steps that no checkpoint kept, are dropped.
        boards: Where numbers are shown besides.
        clock: Gives seconds.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        first_step: int,
        boards: Sequence[Board] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._file, self.boards, self._clock = steps, run / METRICS_FILE, boards, clock
        self._first: tuple[int, float] | None = None
        """Steps taken at the first line of this process, and when."""
        self._first_step = first_step
        if self._file.exists():
            self._keep(lambda values: values["step"] <= first_step)

    def write(self, metrics: StepMetrics) -> None:
        """Adds one line to each log.

        Raises:
            InputError: if it cannot be written, on a full disk for one.
        """
        print(metrics.line(self._steps, self._seconds_left(metrics)), flush=True)
        self._add(metrics.values())

    def _seconds_left(self, metrics: StepMetrics) -> float:
        """Returns the time that the steps left take, saving and judging included, as those since the first line did."""
        now, seconds = self._clock(), metrics.step_ms / 1000
        if self._first is None:
            self._first = (metrics.step, now)
        else:
            step, then = self._first
            seconds = (now - then) / (metrics.step - step)
        return (self._steps - metrics.step) * seconds

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the losses of an evaluation after ``step`` steps: a line of its own. Raises likewise.

        It takes the place of one that a run wrote which ended before it was judged in full.
        """
        if step == self._first_step and self._file.exists():
            self._keep(lambda line: line["step"] != step or values.keys().isdisjoint(line))
        print(f"step {step}/{self._steps} " + " ".join(f"{n} {v:.4f}" for n, v in values.items()), flush=True)
        self._add({"step": step, **values})

    def _keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the other lines of the file, and one that is cut off."""
        lines = self._file.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and is_kept(json.loads(line))]
        write_durably(self._file, b"".join(kept))

    def _add(self, values: Mapping[str, float]) -> None:
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with explained(f"writing {self._file.name}", folder=self._file.parent), open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")
        for board in self.boards:
            board.numbers(int(values["step"]), {name: value for name, value in values.items() if name != "step"})
