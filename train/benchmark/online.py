"""``python -m train.benchmark online``: what encoding in front of every step costs, beside the step from a cache.

Frames and token ids come from the CPU's memory, decoded and tokenized already.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from train.benchmark.online_encoders import EncoderSizes, OnlineWork
from train.benchmark.step_command import write_rows
from train.benchmark.step_report import table
from train.benchmark.step_settings import ONLINE, Setting
from train.benchmark.steps import CAPTION_TOKENS, Bench, StepRow, Timing, failed_row, measure_variant
from train.benchmark.variants import FUSED
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
    bench = Bench(setting, ranks, overrides, None)
    rows = [measure_variant(bench, dataclasses.replace(FUSED, name="cached"), timing, [], ranks, None)]
    tokens = min(CAPTION_TOKENS, bench.whole.model_max_length)
    work = OnlineWork(
        frames=setting.frames,
        size=setting.size,
        batch=setting.batch,
        caption_tokens=tokens,
        sizes=sizes,
        device=ranks.device,
    )
    for name, prepare in work.ways().items():
        bench.prepare = prepare
        variant = dataclasses.replace(FUSED, name=name)
        try:
            rows.append(measure_variant(bench, variant, timing, [], ranks, None))
        except torch.OutOfMemoryError:
            rows.append(failed_row(bench, variant, "out of memory"))
    bench.close()
    return rows
