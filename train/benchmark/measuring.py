"""Measuring the variants of a setting one after the other, and going on where one has too little memory."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from train.benchmark.attention_choice import ATTENTION_NAMES, attention_of
from train.benchmark.step_settings import Setting
from train.benchmark.steps import Bench, StepRow, Timing, free_memory
from train.benchmark.variants import FUSED, FUSED_CUDNN, Variant, running_as
from train.model import model_config
from train.model.float8 import has_float8_units
from train.parallel.ranks import Ranks
from train.peak import find_peak


class Benches:
    """A setting's bench, built when it is needed; anew after a variant that ran out of memory half through a step.

    Args:
        setting: Of the bench.
        ranks: Of the benchmark.
        build: Returns a new one.
    """

    def __init__(self, setting: Setting, ranks: Ranks, build: Callable[[], Bench]) -> None:
        self._setting, self._ranks, self._build = setting, ranks, build
        self._bench: Bench | None = None

    def measure(self, variant: Variant, work: Callable[[Bench], StepRow]) -> StepRow:
        """Returns the row that ``work`` makes, or one that says that memory ran out, in building the bench or in it.

        With several ranks it does not return then, for the others may wait in a collective that this one has left.
        """
        try:
            self._bench = self._bench or self._build()
            return work(self._bench)
        except torch.OutOfMemoryError:
            if self._ranks.world_size > 1:
                self._end_all(variant)
            # what the error's frames hold is free behind this block
        self.close()
        return failed_row(self._setting, variant, "out of memory")

    def _end_all(self, variant: Variant) -> None:
        """Ends this process at once, and so all ranks: the launcher ends those that are left.

        Leaving the group in order would wait for them, as they do for this rank.
        """
        print(
            f"error: {self._setting.name}, {variant.name}: rank {self._ranks.rank} has too little memory: use a "
            "smaller --batch, or --checkpointing full; what was measured before is written",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def close(self) -> None:
        """Frees the bench's memory."""
        if self._bench is not None:
            self._bench.close()
            self._bench = None
        free_memory()


def measure(
    setting: Setting,
    ranks: Ranks,
    timing: Timing,
    *,
    overrides: dict[str, Any],
    trace: Path | None,
    device_memory_gib: float | None = None,
) -> list[StepRow]:
    """Returns a row for each variant of a setting, but for one with cuDNN's attention beside one that takes it anyway.

    Args:
        setting: What is trained.
        ranks: Of the benchmark.
        timing: How long to measure.
        overrides: Settings of the model.
        trace: A folder for a trace of a step of each variant, for chrome://tracing; None keeps none.
        device_memory_gib: For checkpointing ``auto``; None: what the device has.
    """
    variants = different_variants(setting, overrides, ranks.device)
    depths: Sequence[int | None] = (None,) if setting.blocks is None else (setting.blocks // 2, setting.blocks)
    shorter: dict[str, float] = {}
    rows: dict[str, StepRow] = {}
    for depth in depths:
        benches = Benches(
            setting,
            ranks,
            lambda depth=depth: Bench(setting, ranks, overrides, depth, device_memory_gib),  # type: ignore[misc]
        )
        is_last = depth == depths[-1]
        with closing(benches):  # after a failure too: ranks do not leave their group while there are graphs
            for variant in variants:
                if variant.name in rows and rows[variant.name].error:  # with half the blocks already
                    continue

                def measured(bench: Bench, variant: Variant = variant, is_last: bool = is_last) -> StepRow:
                    if is_last:
                        return measure_variant(bench, variant, timing, ranks, trace, shorter.get(variant.name))
                    shorter[variant.name] = _seconds(bench, variant, timing)
                    return StepRow(setting=setting.name, variant=variant.name, batch=setting.batch)

                rows[variant.name] = benches.measure(variant, measured)
    return list(rows.values())


def different_variants(setting: Setting, overrides: dict[str, Any], device: torch.device) -> Sequence[Variant]:
    """Returns the variants of a setting without that of cuDNN's attention, if ours takes that by itself, without
    products in 8 bits where the device has no units for them, and without graphs on a CPU.

    Args:
        setting: What is trained.
        overrides: Settings of the model.
        device: Where it runs.
    """
    chosen = attention_of(FUSED, model_config(setting.model, **overrides), setting.latent_size, device)
    same = chosen != "flash-attn-3" and FUSED in setting.variants
    return tuple(
        variant
        for variant in setting.variants
        if not (variant is FUSED_CUDNN and same)
        and (not variant.float8 or has_float8_units(device))
        and (not variant.graphs or device.type == "cuda")
    )


def measure_variant(
    bench: Bench,
    variant: Variant,
    timing: Timing,
    ranks: Ranks,
    trace: Path | None = None,
    seconds_with_half: float | None = None,
) -> StepRow:
    """Returns the row of one variant.

    Args:
        bench: Of the setting.
        variant: How to run it.
        timing: How long to measure.
        ranks: Of the benchmark.
        trace: A folder for a trace of one step; None keeps none.
        seconds_with_half: Of a step of the same variant with half as many blocks, if not all run.
    """
    setting, on_gpu = bench.setting, ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(bench, variant, timing)
    allocated, reserved, other = [ranks.maximum(taken / 2**30) for taken in _memory()] if on_gpu else [None] * 3
    with running_as(bench.model, variant), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        parts = {} if variant.graphs else bench.parts()
        if trace is not None and ranks.is_first:
            _keep_trace(bench, trace / f"{setting.name} {variant.name}.json".replace("/", "-").replace(" ", "_"))
        elif trace is not None:
            bench.step()
        asked = on_gpu and bench.prepare is None and not variant.transposes
        launching = bench.launching_seconds(timing) if asked else None
    if setting.blocks is not None and seconds_with_half is not None:
        of_a_block = (seconds - seconds_with_half) / (setting.blocks - setting.blocks // 2)
        seconds += of_a_block * (bench.whole.depth - setting.blocks)
    samples = setting.batch / setting.sequence_parallel / seconds
    tflops = bench.flop() / setting.sequence_parallel / seconds / 1e12
    published = setting.published_for(variant.name)
    rate = samples * (1 if setting.frames == 1 else bench.tokens)
    return StepRow(
        setting=setting.name,
        variant=variant.name,
        batch=setting.batch,
        num_ranks=ranks.world_size,
        attention=ATTENTION_NAMES[attention_of(variant, bench.config, setting.latent_size, ranks.device)],
        recomputed=str(bench.recomputation),
        step_ms=seconds * 1000,
        samples_per_second=samples,
        tokens_per_second=samples * bench.tokens,
        tflops=tflops,
        mfu=tflops / find_peak(ranks.device, torch.bfloat16, None if on_gpu else 1.0).tflops,
        peak_memory_gib=allocated,
        reserved_memory_gib=reserved,
        other_memory_gib=other,
        parts_ms=parts,
        launching_ms=None if launching is None else 1000 * launching,
        scaled_from_blocks=setting.blocks,
        published=published,
        times_published=None if published is None else rate / published,
    )


def _memory() -> tuple[int, int, int]:
    """Returns bytes of this device: those of tensors, those that PyTorch's allocator took for them, both at most, and
    those of others."""
    free, total = torch.cuda.mem_get_info()
    other = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), other


def _seconds(bench: Bench, variant: Variant, timing: Timing) -> float:
    bench.set_up(variant)
    with running_as(bench.model, variant):
        return bench.seconds(timing)


def failed_row(setting: Setting, variant: Variant, error: str) -> StepRow:
    """Returns the row of a variant that did not run."""
    published = setting.published_for(variant.name)
    return StepRow(setting=setting.name, variant=variant.name, batch=setting.batch, published=published, error=error)


def _keep_trace(bench: Bench, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        bench.step()
    profile.export_chrome_trace(str(path))
