"""``python -m train.benchmark images`` and ``stdit``: training steps a second, and where their time goes."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from shared.errors import InputError
from train.benchmark.measuring import measure
from train.benchmark.step_report import table
from train.benchmark.step_settings import Setting
from train.benchmark.steps import StepRow, Timing
from train.config.architecture import ArchitectureOptions
from train.parallel.ranks import join_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBenchmark:
    """Measures the trainer's step on random latents and captions, beside the model as published code runs it."""

    output: Path | None = None
    """A JSON file for the results; the table stands beside it, with .md."""
    only: tuple[str, ...] = ()
    """Rows whose names contain one of these, such as 16x256; all by default."""
    variants: tuple[str, ...] = ()
    """Variants by name, such as plain and ours; all of the row by default."""
    batch: int | None = None
    """In place of the rows' batch sizes."""
    checkpointing: str | None = None
    """In place of the rows': none, selective or full."""
    profile: Path | None = None
    """A folder for a trace of one step of each variant."""
    timing: tyro.conf.OmitArgPrefixes[Timing] = field(default_factory=Timing)
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Settings of the rows' models that differ from their presets. Values are JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def run(name: str, settings: Sequence[Setting], arguments: Sequence[str]) -> int:
    """Measures settings, prints the table, writes the results and returns the exit code.

    Args:
        name: Of the benchmark.
        settings: Its rows.
        arguments: Of the command line.
    """
    config = tyro.cli(StepBenchmark, prog=f"python -m train.benchmark {name}", args=arguments)
    chosen = _choose(config, settings)
    rows: list[StepRow] = []
    with join_ranks() as ranks:
        for setting in chosen:
            overrides = ArchitectureOptions(model_settings=config.model_settings).overrides
            rows += measure(setting, ranks, config.timing, overrides=overrides, trace=config.profile)
            if ranks.is_first:
                print(table(rows[-len(setting.variants) :]), flush=True)
                if config.output is not None:  # after each row: the next may take minutes
                    write_rows(config.output, name, rows, ranks.world_size)
    return 0


def _choose(config: StepBenchmark, settings: Sequence[Setting]) -> list[Setting]:
    chosen = []
    for setting in settings:
        if config.only and not any(part in setting.name for part in config.only):
            continue
        variants = tuple(v for v in setting.variants if not config.variants or v.name in config.variants)
        if not variants:
            names = ", ".join(variant.name for variant in setting.variants)
            raise InputError(f"variants {', '.join(config.variants)}: {setting.name} has {names}")
        changes: dict[str, Any] = {"variants": variants}
        if config.batch is not None:
            changes["batch"] = config.batch
        if config.checkpointing is not None:
            changes["checkpointing"] = config.checkpointing
        chosen.append(dataclasses.replace(setting, **changes))
    if not chosen:
        raise InputError(f"only {' '.join(config.only)}: expected part of {', '.join(each.name for each in settings)}")
    return chosen


def write_rows(output: Path, name: str, rows: list[StepRow], world_size: int) -> None:
    on_gpu = torch.cuda.is_available()
    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "num_devices": world_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    values = {"benchmark": name, "machine": machine, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(values, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(rows) + "\n")
