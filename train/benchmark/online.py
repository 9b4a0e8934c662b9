"""``python -m train.benchmark online``: what encoding in front of every step costs, beside the step from a cache.

Frames and token ids come from the CPU's memory, decoded and tokenized already.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from shared.errors import InputError
from train.benchmark.measuring import Benches, failed_row, measure_variant
from train.benchmark.online_encoders import EncoderSizes, OnlineWork
from train.benchmark.results import make_room
from train.benchmark.step_command import MEASURED, write_rows
from train.benchmark.step_report import tables
from train.benchmark.step_settings import CACHED, ONLINE, WAYS, Setting
from train.benchmark.steps import CAPTION_TOKENS, Bench, StepRow, Timing, free_memory
from train.benchmark.variants import FUSED
from train.config.parallel import Checkpointing
from train.data import Batch
from train.model import model_config
from train.parallel.ranks import Ranks, join_ranks

FULL_SIZE = EncoderSizes(t5={}, vae={})
ABOUT = """Measures training with T5-XXL and SD's autoencoder (real sizes, random weights) in front of every step, one
after the other on one stream: as published code does (baseline: T5 by transformers, the whole batch through diffusers'
autoencoder, eager), with this project's T5, and with its T5 and autoencoder, 16 frames a pass. Beside them stand the
step from a cache, the encoders by themselves, and the sum of these two.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineBenchmark:
    """Measures steps from a cache in memory, and with T5-XXL and SD's autoencoder in front of each."""

    output: Path | None = None
    """A JSON file for the results; the tables stand beside it, with .md."""
    only: tuple[str, ...] = ()
    """Rows by how a word of their names begins, such as 16x256; all by default."""
    batch: int | None = None
    """In place of the rows' batch sizes."""
    checkpointing: Checkpointing | None = None
    """In place of the rows', which compute as little again as the memory beside the encoders allows."""
    device_memory_gib: float | None = None
    """What auto checkpointing may fill; by default what the encoders leave of the device."""
    timing: tyro.conf.OmitArgPrefixes[Timing] = field(default_factory=Timing)
    debug: bool = False
    """Show the traceback of an error."""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, writes the results and returns the exit code.

    Raises:
        InputError: for rows that are not there, or several ranks.
    """
    config = tyro.cli(
        OnlineBenchmark, prog="python -m train.benchmark online", args=arguments, description=ABOUT + MEASURED
    )
    make_room(config.output)
    chosen = [each for each in ONLINE if each.is_named(config.only)]
    if not chosen:
        names = ", ".join(each.name for each in ONLINE)
        raise InputError(f"only {' '.join(config.only)}: expected the beginning of words of {names}")
    rows: list[StepRow] = []
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise InputError(f"online is measured on one GPU: found {ranks.world_size} ranks")
        for setting in chosen:
            changed = dataclasses.replace(
                setting,
                batch=config.batch or setting.batch,
                checkpointing=config.checkpointing or setting.checkpointing,
            )
            rows += measure_online(
                changed,
                ranks,
                config.timing,
                overrides={},
                sizes=FULL_SIZE,
                device_memory_gib=config.device_memory_gib,
            )
            print(tables([row for row in rows if row.setting == setting.name]), end="\n\n", flush=True)
            if config.output is not None:
                write_rows(config.output, "online", rows, ranks.world_size)
    return 0


def measure_online(
    setting: Setting,
    ranks: Ranks,
    timing: Timing,
    *,
    overrides: dict[str, Any],
    sizes: EncoderSizes,
    device_memory_gib: float | None = None,
) -> list[StepRow]:
    """Returns the row from a cache, then one for each way to encode.

    The encoders stay on the device throughout, so that all rows have the same memory, and compute the same again.

    Args:
        setting: What is trained.
        ranks: Of the benchmark, one.
        timing: How long to measure.
        overrides: Settings of the model.
        sizes: Of the encoders.
        device_memory_gib: For checkpointing ``auto``; None: what the encoders leave.
    """
    ways: dict[str, Callable[[Batch], Batch]] = {}
    with suppress(torch.OutOfMemoryError):  # and what the error's frames hold is free behind it
        ways = OnlineWork(
            frames=setting.frames,
            size=setting.size,
            batch=setting.batch,
            caption_tokens=min(CAPTION_TOKENS, model_config(setting.model, **overrides).model_max_length),
            sizes=sizes,
            device=ranks.device,
        ).ways()
    free_memory()
    benches = Benches(setting, ranks, lambda: Bench(setting, ranks, overrides, None, device_memory_gib))
    rows: list[StepRow] = []
    for name, prepare in {CACHED: None, **dict.fromkeys(WAYS), **ways}.items():
        variant = dataclasses.replace(FUSED, name=name)
        if prepare is None and name != CACHED:
            rows.append(failed_row(setting, variant, "out of memory"))
            continue

        def work(bench: Bench, variant: Any = variant, prepare: Callable[[Batch], Batch] | None = prepare) -> StepRow:
            if prepare is None:
                return measure_variant(bench, variant, timing, ranks)
            bench.prepare = prepare
            encoders_ms = bench.encoders_seconds(timing) * 1000
            return dataclasses.replace(
                measure_variant(bench, variant, timing, ranks),
                encoders_alone_ms=encoders_ms,
                sum_of_parts_ms=rows[0].step_ms + encoders_ms,
            )

        rows.append(benches.measure(variant, work))
    benches.close()
    return rows
