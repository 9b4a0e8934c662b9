"""From the command line to a configuration: a preset, then a file, then what is typed, each over the one before."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from train.config.files import read_config_file
from train.config.presets import preset_values
from train.config.run import GROUPS, OPTIONS, TrainConfig


def parse_command_line(arguments: Sequence[str], *, console_outputs: bool = True) -> TrainConfig:
    """Returns the configuration that the command line asks for.

    Args:
        arguments: Without the program's name.
        console_outputs: Print help and mistakes.

    Raises:
        InputError: for a preset, a file or values that do not fit.
        SystemExit: from the parser, for --help and for words that it does not know.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    try:
        named, _ = early.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # a flag without its value: the parser below says so
        named = argparse.Namespace(preset=None, config=None)
    values: dict[str, Any] = {}
    if named.preset is not None:
        values |= preset_values(named.preset)
    if named.config is not None:
        values |= read_config_file(named.config)
    config: TrainConfig = tyro.cli(
        TrainConfig,
        prog="python -m train",
        args=list(arguments),
        default=_defaults(values),
        console_outputs=console_outputs,
    )
    return config


def _defaults(values: Mapping[str, Any]) -> TrainConfig:
    """Returns a configuration to fill in, unchecked: what is checked is the whole."""
    groups = {
        group: _unchecked(kind, {name: values[name] for name in values if OPTIONS[name] == group})
        for group, kind in GROUPS.items()
    }
    unchecked: TrainConfig = _unchecked(
        TrainConfig, groups | {name: values[name] for name in values if OPTIONS[name] is None}
    )
    return unchecked


def _unchecked(kind: Any, values: Mapping[str, Any]) -> Any:
    instance = object.__new__(kind)
    for option in dataclasses.fields(kind):
        value = values.get(option.name, option.default)
        object.__setattr__(instance, option.name, tyro.MISSING if value is dataclasses.MISSING else value)
    return instance
