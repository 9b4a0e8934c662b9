"""Naming a model's weights by a hash, computed once a node.

The hash of five billion weights takes a worker a quarter of a minute, and a node may have eight. So it is kept in a
folder of the node, by what the file system says of the files: a file that is replaced or rewritten in place has another
inode or another time of change, which nobody sets at will.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.encoders.location import model_folder

_LEAST_BYTES = 64 << 20
"""Of files: less is hashed anew in a moment, and nothing is written for it."""
_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json"}
_VARIABLE = "LATENTMILL_CACHE"


def weights_sha256(module: torch.nn.Module) -> str:
    """Returns a hash of a module's parameters and buffers: of their names, shapes and values in float32.

    Call it before the weights are cast to the type in which they compute. The hash then depends neither on the file
    format, nor on where the files lay, nor on whether float16 weights were stored as float32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """The files of a model as they were at some time; take it before they are loaded.

    Two are equal only if no file was touched between them.
    """

    key: str | None
    """Of what the file system says of them; None if they were not there."""
    num_bytes: int

    @classmethod
    def of(cls, model: str) -> "WeightFiles":
        """Returns those of a hub id or a folder, without reading them."""
        folder = model_folder(model)
        if folder is None:
            return cls(key=None, num_bytes=0)
        try:
            found = {
                path.relative_to(folder).as_posix(): path.stat()
                for path in sorted(folder.rglob("*"))
                if path.suffix in _SUFFIXES and path.is_file()
            }
        except OSError:
            return cls(key=None, num_bytes=0)
        facts = [
            [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
            for name, stat in found.items()
        ]
        text = json.dumps([str(folder.resolve()), facts])
        num_bytes = sum(stat.st_size for stat in found.values())
        return cls(key=hashlib.sha256(text.encode()).hexdigest(), num_bytes=num_bytes)


def known_weights_sha256(module: torch.nn.Module, model: str, before: WeightFiles, versions: Mapping[str, str]) -> str:
    """Returns :func:`weights_sha256` of a module that was just loaded; of its files it is computed once a node.

    Workers that load at the same time wait for the first of them. Where nothing can be kept, it is computed.

    Args:
        module: The model.
        model: Hub id or folder that it was loaded from.
        before: Its files before they were loaded; if they changed since, the hash is computed and not kept.
        versions: Of what named the weights.
    """
    now = WeightFiles.of(model)
    if now.key is None or now.num_bytes < _LEAST_BYTES or before.key not in (None, now.key):
        return weights_sha256(module)
    text = json.dumps([now.key, type(module).__name__, sorted(versions.items())])
    place = _folder() / hashlib.sha256(text.encode()).hexdigest()
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(place.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            if (known := _read(place)) is not None:
                return known
            found = weights_sha256(module)
            if WeightFiles.of(model) == now:
                temporary = place.with_suffix(f".{os.getpid()}")
                temporary.write_text(found)
                temporary.replace(place)
            return found
    except OSError:
        return weights_sha256(module)


def _folder() -> Path:
    named = os.environ.get(_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named or Path(home) / "latentmill") / "weights"


def _read(place: Path) -> str | None:
    try:
        text = place.read_text()
    except FileNotFoundError:
        return None
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else None
