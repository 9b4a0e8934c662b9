"""``python -m train.benchmark online``: what encoding in front of every step costs, beside the step from a cache.

Frames and token ids come from the CPU's memory, decoded and tokenized already.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from train.benchmark.measuring import Benches, failed_row, measure_variant
from train.benchmark.online_encoders import EncoderSizes, OnlineWork
from train.benchmark.step_command import write_rows
from train.benchmark.step_report import table
from train.benchmark.step_settings import ONLINE, Setting
from train.benchmark.steps import CAPTION_TOKENS, Bench, StepRow, Timing
from train.benchmark.variants import FUSED
from train.data import Batch
from train.model import model_config
from train.parallel.ranks import Ranks, join_ranks

FULL_SIZE = EncoderSizes(t5={}, vae={})


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineBenchmark:
    """Measures steps from a cache in memory, and with T5-XXL and SD's autoencoder in front of each."""

    output: Path | None = None
    """A JSON file for the results; the table stands beside it, with .md."""
    batch: int | None = None
    """In place of the rows' batch sizes."""
    timing: tyro.conf.OmitArgPrefixes[Timing] = field(default_factory=Timing)
    debug: bool = False
    """Show the traceback of an error."""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code."""
    config = tyro.cli(OnlineBenchmark, prog="python -m train.benchmark online", args=arguments)
    rows: list[StepRow] = []
    with join_ranks() as ranks:
        for setting in ONLINE:
            chosen = setting if config.batch is None else dataclasses.replace(setting, batch=config.batch)
            found = measure_online(chosen, ranks, config.timing, overrides={}, sizes=FULL_SIZE)
            rows += found
            if ranks.is_first:
                print(table(found), flush=True)
                if config.output is not None:
                    write_rows(config.output, "online", rows, ranks.world_size)
    return 0


def measure_online(
    setting: Setting, ranks: Ranks, timing: Timing, *, overrides: dict[str, Any], sizes: EncoderSizes
) -> list[StepRow]:
    """Returns the row from a cache, then one for each way to encode.

    Args:
        setting: What is trained.
        ranks: Of the benchmark.
        timing: How long to measure.
        overrides: Settings of the model.
        sizes: Of the encoders.
    """
    benches = Benches(setting, lambda: Bench(setting, ranks, overrides, None))

    def measured(name: str, prepare: Callable[[Batch], Batch] | None) -> StepRow:
        variant = dataclasses.replace(FUSED, name=name)

        def work(bench: Bench) -> StepRow:
            if prepare is not None:
                bench.prepare = prepare
            return measure_variant(bench, variant, timing, [], ranks, None)

        return benches.measure(variant, work)

    rows = [measured("cached", None)]
    ways: dict[str, Callable[[Batch], Batch]] = {}
    try:
        ways = OnlineWork(
            frames=setting.frames,
            size=setting.size,
            batch=setting.batch,
            caption_tokens=min(CAPTION_TOKENS, model_config(setting.model, **overrides).model_max_length),
            sizes=sizes,
            device=ranks.device,
        ).ways()
    except torch.OutOfMemoryError:
        rows.append(failed_row(setting, dataclasses.replace(FUSED, name="online"), "out of memory"))
    rows += [measured(name, prepare) for name, prepare in ways.items()]
    benches.close()
    return rows
