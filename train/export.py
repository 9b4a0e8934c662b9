"""``python -m train.export RUN``: a run's weights as such weights are published, for this and other programs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shared.errors import InputError, run_entry_point
from train.config import DEFAULTS
from train.lora import has_lora, write_adapter
from train.model import model_config
from train.model.config import STDiT3Config
from train.model.published import write_published
from train.run_folder import read_run
from train.run_weights import Which, read_run_weights, weights_file

WEIGHTS_NAME, ADAPTER_FOLDER = "model.safetensors", "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a run's weights in the layout in which such weights are published.

    Of a run with --lora-rank, the additions are merged into the weights, and written as a peft adapter too.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """A new folder: model.safetensors, of STDiT3 config.json too, of additions the folder adapter."""
    ema: bool = True
    """Take the moving average of the weights, or the weights themselves."""
    checkpoint: Path | None = None
    """One of the run's checkpoints; the newest by default."""
    debug: bool = False
    """Show the traceback of an error."""


def export(config: ExportConfig) -> int:
    """Writes the files and returns the exit code.

    Raises:
        InputError: if the run has no such weights, or the output is there already.
    """
    run = read_run(config.run)
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise InputError(f"{config.output}: is there already: expected a new or empty folder")
    which: Which = "ema" if config.ema else "plain"
    weights = read_run_weights(run, weights_file(config.run, config.checkpoint, which, otherwise="--no-ema"))
    architecture = model_config((DEFAULTS | run.config)["model"], **run.model_config)
    published = config.output if isinstance(architecture, STDiT3Config) else config.output / WEIGHTS_NAME
    write_published(published, architecture, weights.plain())
    print(f"{weights.file}: written to {config.output / WEIGHTS_NAME}")
    if has_lora(weights.state):
        write_adapter(config.output / ADAPTER_FOLDER, weights.state, weights.finetuning)
        print(f"its additions: written to {config.output / ADAPTER_FOLDER}")
    return 0


def main() -> int:
    """Returns the exit code for the settings of the command line."""
    debug = "--debug" in sys.argv
    return run_entry_point(lambda: export(tyro.cli(ExportConfig, prog="python -m train.export")), debug=debug)


if __name__ == "__main__":
    sys.exit(main())
