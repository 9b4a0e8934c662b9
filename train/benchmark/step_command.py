"""``python -m train.benchmark images`` and ``stdit``: training steps a second, and where their time goes."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from shared.errors import InputError
from train.benchmark.measuring import measure
from train.benchmark.one_rank import measure_one_rank
from train.benchmark.results import make_room, write_results
from train.benchmark.step_report import tables
from train.benchmark.step_settings import Setting
from train.benchmark.steps import StepRow, Timing
from train.config.architecture import ArchitectureOptions
from train.config.parallel import Checkpointing
from train.parallel.ranks import Ranks, join_ranks

MEASURED = """
Each row is a model of real size with random weights in the trainer's own step: DeepSpeed's engine (ZeRO 2), bfloat16
with float32 masters, clipping, AdamW, the moving average; batches of random latents and captions of 120 tokens from
memory. It gives samples, tokens and TFLOP a second, MFU (of the device's dense bfloat16 peak; three times the forward
pass is counted, recomputation is not), the most memory, and the milliseconds of attention in space, in time, among all
tokens, to captions, of the MLP, the optimiser, the rest, and the wait for data. A step's time is the median of those
timed.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBenchmark:
    """Measures the trainer's step, beside the model as published code runs it."""

    output: Path | None = None
    """A JSON file for the results; the tables stand beside it, with .md."""
    only: tuple[str, ...] = ()
    """Rows by how a word of their names begins, such as dit or 16x256; by default all that are for as many ranks as
    there are."""
    variants: tuple[str, ...] = ()
    """Variants by name, such as plain and ours; all of the row by default."""
    batch: int | None = None
    """In place of the rows' batch sizes."""
    checkpointing: Checkpointing | None = None
    """In place of the rows'."""
    device_memory_gib: float | None = None
    """What auto checkpointing may fill; by default what the device has."""
    profile: Path | None = None
    """A folder for a trace of one step of each variant."""
    timing: tyro.conf.OmitArgPrefixes[Timing] = field(default_factory=Timing)
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Settings of the rows' models that differ from their presets. Values are JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def run(name: str, settings: Sequence[Setting], arguments: Sequence[str], *, about: str) -> int:
    """Measures settings, prints the tables, writes the results and returns the exit code.

    Args:
        name: Of the benchmark.
        settings: Its rows.
        arguments: Of the command line.
        about: What the rows are, for --help.
    """
    config = tyro.cli(
        StepBenchmark, prog=f"python -m train.benchmark {name}", args=arguments, description=about + MEASURED
    )
    make_room(config.output)
    chosen = _choose(config, settings)
    rows: list[StepRow] = []
    with join_ranks() as ranks:
        for setting in ranks.agree(lambda: _for_ranks(name, chosen, ranks)):
            found = _measure(name, setting, ranks, config)
            rows += found
            if ranks.is_first:
                print(tables(found), end="\n\n", flush=True)
                if config.output is not None:  # after each row: the next may take minutes
                    write_rows(config.output, name, rows, ranks.world_size)
    return 0


def _measure(name: str, setting: Setting, ranks: Ranks, config: StepBenchmark) -> list[StepRow]:
    alone = []
    if setting.against_one:
        alone = measure_one_rank(name, setting, ranks, config.timing, config.model_settings, config.device_memory_gib)
    found = measure(
        setting,
        ranks,
        config.timing,
        overrides=ArchitectureOptions(model_settings=config.model_settings).overrides,
        trace=config.profile,
        device_memory_gib=config.device_memory_gib,
    )
    of_one = {row.variant: row.tokens_per_second for row in alone if not row.error}
    found = [
        dataclasses.replace(row, times_one_rank=ranks.world_size * row.tokens_per_second / of_one[row.variant])
        if row.variant in of_one
        else row
        for row in found
    ]
    return alone + found


def _choose(config: StepBenchmark, settings: Sequence[Setting]) -> list[Setting]:
    chosen = []
    for setting in settings:
        if not setting.is_named(config.only):
            continue
        changes: dict[str, Any] = {
            "variants": tuple(v for v in setting.variants if not config.variants or v.name in config.variants)
        }
        if config.batch is not None:
            changes["batch"] = config.batch
        if config.checkpointing is not None:
            changes["checkpointing"] = config.checkpointing
        chosen.append(dataclasses.replace(setting, **changes))
    if not chosen:
        rows = "; ".join(each.name for each in settings)  # which have commas themselves, as variants do
        raise InputError(f"only {' '.join(config.only)}: expected the beginning of words of {rows}")
    with_variants = [setting for setting in chosen if setting.variants]
    if not with_variants:
        names = dict.fromkeys(variant.name for setting in settings for variant in setting.variants)
        raise InputError(f"variants {', '.join(config.variants)}: expected some of: {'; '.join(names)}")
    return with_variants


def _for_ranks(name: str, settings: Sequence[Setting], ranks: Ranks) -> list[Setting]:
    """Returns the rows that are for as many ranks as there are; the first rank tells of the others.

    Raises:
        InputError: if there are none.
    """
    wanted = {setting.num_ranks for setting in settings} - {ranks.world_size}
    told = [
        f"{', '.join(each.name for each in settings if each.num_ranks == number)}: "
        + (f"torchrun --nproc-per-node {number}" if number > 1 else "python")
        + f" -m train.benchmark {name}"
        for number in sorted(wanted)
    ]
    fit = [setting for setting in settings if setting.num_ranks == ranks.world_size]
    if not fit:
        raise InputError(f"no row for {ranks.world_size} ranks: {'; '.join(told)}")
    if told and ranks.is_first:
        print(f"left out, for other numbers of GPUs: {'; '.join(told)}\n", flush=True)
    return fit


def write_rows(output: Path, name: str, rows: list[StepRow], world_size: int) -> None:
    """Writes the rows as JSON, and their tables beside it."""
    on_gpu = torch.cuda.is_available()
    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "num_devices": world_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    values = {"benchmark": name, "machine": machine, "rows": [asdict(row) for row in rows]}
    write_results(output, values, tables(rows))
