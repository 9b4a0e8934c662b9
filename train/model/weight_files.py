"""Files of weights, as published: read without running anything that they hold, and written in the same layout."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import InputError
from shared.stores.files import explained, give_usual_mode, make_folder

_FOLDER_WEIGHTS, _FOLDER_CONFIG = "model.safetensors", "config.json"
_PICKLES = (".pth", ".pt", ".bin")
_WRAPPERS = ("ema", "state_dict_ema", "model", "state_dict")
"""Keys under which training scripts put a state dict, the better first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """What a file of weights holds."""

    source: str
    """As the user named it."""
    tensors: dict[str, Tensor]
    """By name, on the CPU."""
    config: dict[str, Any] | None
    """Of the folder's ``config.json``; None for a single file."""


def read_weights(source: str | Path) -> WeightFile:
    """Returns the weights of a file or a folder, on disk or in a Hugging Face repository.

    Pickles are read by PyTorch's restricted reader, which makes tensors and nothing else.

    Args:
        source: A ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file; a folder with ``model.safetensors`` and
            ``config.json``; or either in a repository: ``OWNER/NAME/FILE``, ``OWNER/NAME``.

    Raises:
        InputError: if there is no such file, it is damaged, or holds more than tensors.
    """
    name = str(source)
    file, config_file = _locate(name)
    config = None
    if config_file is not None:
        try:
            config = json.loads(config_file.read_text())
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}")
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: {_FOLDER_CONFIG} cannot be read ({error})") from None
    try:
        values = load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    except UnpicklingError:
        raise InputError(
            f"{name}: holds Python objects besides tensors, which may run code when they are read: convert it to "
            "safetensors with a program that you trust"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{name}: not a readable file of weights ({' '.join(str(error).split())})") from None
    tensors = _unwrap(values)
    if not tensors:
        raise InputError(
            f"{name}: holds no tensors by name: expected a state dict, or one under {', '.join(_WRAPPERS)}"
        )
    return WeightFile(source=name, tensors=tensors, config=config)


def write_weights(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Writes weights: into a folder with ``config.json`` if there is a configuration, else into one file.

    Args:
        path: A folder, which is made; or a file, ``.safetensors`` or ``.pth``.
        tensors: By name.
        config: JSON.

    Raises:
        InputError: for a file of another kind, or one that cannot be written.
    """
    if config is None and path.suffix not in (".safetensors", *_PICKLES):
        raise InputError(f"{path}: expected a file ending in .safetensors, {', '.join(_PICKLES)}")
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    folder = path.parent if config is None else path
    with explained(f"writing weights to {path.name}", folder=folder):
        make_folder(folder)
        if config is None and path.suffix in _PICKLES:
            torch.save(contiguous, path)
            return
        file = path if config is None else path / _FOLDER_WEIGHTS
        try:
            save_file(contiguous, file, metadata={"format": "pt"})
            give_usual_mode(file)  # safetensors 0.8 writes 0600
        except SafetensorError as error:
            raise InputError(f"{file}: cannot be written ({error}): make room there or choose another place") from None
        if config is not None:
            (path / _FOLDER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def require_there(source: str) -> None:
    """Raises :class:`InputError` if a source is not on disk, nor can be in a repository, which is not asked."""
    _on_disk(source)


def _on_disk(name: str) -> tuple[Path, Path | None] | None:
    """Returns the file of weights, and that of the configuration beside it; None if a repository may have them."""
    path = Path(name)
    if path.is_dir():
        if not (path / _FOLDER_WEIGHTS).is_file() or not (path / _FOLDER_CONFIG).is_file():
            raise InputError(f"{name}: found no {_FOLDER_WEIGHTS} with {_FOLDER_CONFIG}: name the file of weights")
        return path / _FOLDER_WEIGHTS, path / _FOLDER_CONFIG
    parts = name.split("/")
    if path.is_file():
        if path.suffix not in (".safetensors", *_PICKLES):
            raise InputError(f"{name}: expected a file ending in .safetensors, {', '.join(_PICKLES)}")
        return path, None
    if path.is_absolute() or name.startswith(".") or len(parts) < 2 or (path.suffix and len(parts) < 3):
        raise InputError(f"{name}: no such file or folder")
    return None


def _locate(name: str) -> tuple[Path, Path | None]:
    """Returns the file of weights, and that of the configuration beside it."""
    found = _on_disk(name)
    if found is not None:
        return found
    path, parts = Path(name), name.split("/")
    repository, rest = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if path.suffix in (".safetensors", *_PICKLES) and rest:
            return Path(hf_hub_download(repository, rest)), None
        prefix = f"{rest}/" if rest else ""
        config = Path(hf_hub_download(repository, f"{prefix}{_FOLDER_CONFIG}"))
        return Path(hf_hub_download(repository, f"{prefix}{_FOLDER_WEIGHTS}")), config
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{name}: no such file or folder here, nor as OWNER/NAME or OWNER/NAME/FILE at Hugging Face "
            f"({' '.join(str(error).split())})"
        ) from None


def _read_pickle(file: Path) -> Any:
    mapped = zipfile.is_zipfile(file)  # older files cannot be mapped into memory
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _unwrap(values: Any) -> dict[str, Tensor]:
    """Returns the state dict of what was read, without the prefix of data parallelism."""
    if not isinstance(values, Mapping):
        return {}
    for key in _WRAPPERS:
        if isinstance(values.get(key), Mapping):
            return _unwrap(values[key])
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
