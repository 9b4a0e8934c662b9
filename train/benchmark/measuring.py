"""Measuring the variants of a setting one after the other, and going on where one has too little memory."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from train.benchmark.step_settings import Setting
from train.benchmark.steps import Bench, StepRow, Timing, free_memory
from train.benchmark.variants import Variant, running_as
from train.parallel.ranks import Ranks
from train.peak import find_peak


class Benches:
    """A setting's bench, built when it is needed; anew after a variant that ran out of memory half through a step.

    Args:
        setting: Of the bench.
        build: Returns a new one.
    """

    def __init__(self, setting: Setting, build: Callable[[], Bench]) -> None:
        self._setting, self._build = setting, build
        self._bench: Bench | None = None

    def measure(self, variant: Variant, work: Callable[[Bench], StepRow]) -> StepRow:
        """Returns the row that ``work`` makes, or one that says that memory ran out, in building the bench or in it."""
        try:
            self._bench = self._bench or self._build()
            return work(self._bench)
        except torch.OutOfMemoryError:
            pass  # what the error's frames hold is free behind this block
        self.close()
        return failed_row(self._setting, variant, "out of memory")

    def close(self) -> None:
        """Frees the bench's memory."""
        if self._bench is not None:
            self._bench.close()
            self._bench = None
        free_memory()


def measure(
    setting: Setting, ranks: Ranks, timing: Timing, *, overrides: dict[str, Any], trace: Path | None
) -> list[StepRow]:
    """Returns a row for each variant of a setting.

    Args:
        setting: What is trained.
        ranks: Of the benchmark.
        timing: How long to measure.
        overrides: Settings of the model.
        trace: A folder for a trace of a step of each variant, for chrome://tracing; None keeps none.
    """
    depths: Sequence[int | None] = (None,) if setting.blocks is None else (setting.blocks // 2, setting.blocks)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in setting.variants}
    rows: dict[str, StepRow] = {}
    for depth in depths:
        benches = Benches(setting, lambda depth=depth: Bench(setting, ranks, overrides, depth))  # type: ignore[misc]
        kept = trace if depth == depths[-1] else None
        for variant in setting.variants:
            if variant.name in rows and rows[variant.name].error:  # with half the blocks already
                continue

            def measured(bench: Bench, variant: Variant = variant, kept: Path | None = kept) -> StepRow:
                return measure_variant(bench, variant, timing, seconds[variant.name], ranks, kept)

            rows[variant.name] = benches.measure(variant, measured)
        benches.close()
    return list(rows.values())


def measure_variant(
    bench: Bench, variant: Variant, timing: Timing, seconds: list[float], ranks: Ranks, trace: Path | None
) -> StepRow:
    """Returns the row of one variant.

    Args:
        bench: Of the setting.
        variant: How to run it.
        timing: How long to measure.
        seconds: Of a step of the same variant with fewer blocks, if any; this one's are added.
        ranks: Of the benchmark.
        trace: A folder for a trace of one step; None keeps none.
    """
    setting, on_gpu = bench.setting, ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with running_as(bench.model, variant), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        seconds.append(bench.seconds(timing))
        memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        parts = bench.parts()
        if trace is not None:
            _keep_trace(bench, trace / f"{setting.name} {variant.name}.json".replace("/", "-").replace(" ", "_"))
    whole = seconds[-1]
    if setting.blocks is not None and len(seconds) > 1:
        of_a_block = (seconds[1] - seconds[0]) / (setting.blocks - setting.blocks // 2)
        whole += of_a_block * (bench.whole.depth - setting.blocks)
    tflops = bench.flop() / whole / 1e12
    return StepRow(
        setting=setting.name,
        variant=variant.name,
        batch=setting.batch,
        checkpointing=setting.checkpointing,
        step_ms=whole * 1000,
        samples_per_second=setting.batch / whole,
        tokens_per_second=setting.batch * bench.tokens / whole,
        tflops=tflops,
        mfu=tflops / find_peak(ranks.device, torch.bfloat16, None if on_gpu else 1.0).tflops,
        peak_memory_gib=memory,
        parts_ms=parts,
        scaled_from_blocks=setting.blocks,
        published=setting.published,
    )


def failed_row(setting: Setting, variant: Variant, error: str) -> StepRow:
    """Returns the row of a variant that did not run."""
    nan = float("nan")
    return StepRow(
        setting=setting.name, variant=variant.name, batch=setting.batch, checkpointing=setting.checkpointing,
        step_ms=nan, samples_per_second=nan, tokens_per_second=nan, tflops=nan, mfu=nan, peak_memory_gib=None,
        parts_ms={}, published=setting.published, error=error,
    )  # fmt: skip


def _keep_trace(bench: Bench, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        bench.step()
    profile.export_chrome_trace(str(path))
