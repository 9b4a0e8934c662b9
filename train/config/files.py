"""Configurations in files: the ``run.json`` of a run, or options by name in JSON or YAML."""

import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from shared.errors import InputError
from train.config.run import NOT_SAVED, OPTIONS, TYPES


def read_config_file(path: Path) -> dict[str, Any]:
    """Returns the options that a file sets, by name.

    Args:
        path: A ``.json``, ``.yaml`` or ``.yml`` file of options by name, or the ``run.json`` of a run.

    Raises:
        InputError: if it cannot be read, names an option that there is not, or a value is of the wrong kind.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"--config {path}: expected a .json, .yaml or .yml file")
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: not {path.suffix[1:].upper()} ({' '.join(str(error).split())})") from None
    if isinstance(values, Mapping) and isinstance(values.get("config"), Mapping) and "model_config" in values:
        values = values["config"]
    if not isinstance(values, Mapping):
        raise InputError(f"--config {path}: expected options by name, found {type(values).__name__}")
    try:
        return {str(name): value_from_json(str(name), value) for name, value in values.items()}
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None


def value_from_json(name: str, value: Any) -> Any:
    """Returns the value of option ``name`` as read from JSON or YAML.

    Raises:
        InputError: if there is no such option, or the value is of the wrong kind.
    """
    if name not in OPTIONS or name in NOT_SAVED:
        raise InputError(f"unknown option {name!r}: expected one that --help shows, with _ for -")
    try:
        return _convert(TYPES[name], value)
    except TypeError:
        raise InputError(f"{name}={value!r}: expected {_describe(TYPES[name])}") from None


def _convert(kind: Any, value: Any) -> Any:
    """Returns ``value`` as one of ``kind``; raises TypeError if it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _convert(arguments[0], value)
    if origin in (Union, types.UnionType):
        for each in arguments:
            try:
                return _convert(each, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise TypeError
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_convert(each, item) for each, item in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, str):  # YAML reads 2e-5 as a text
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is type(None) and value is None:
        return None
    if type(value) is not kind:
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(each) for each in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return names.get(kind, "null")
