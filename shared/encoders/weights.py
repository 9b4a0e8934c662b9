"""Finding a model's files, and naming its weights by a hash."""

import hashlib
from pathlib import Path

import torch

from shared.errors import InputError

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).parent / "demo"


def locate(model: str) -> str:
    """Returns what transformers and diffusers load: a folder, or a hub id such as ``stabilityai/sd-vae-ft-ema``.

    ``demo:t5`` and ``demo:vae`` are the small models inside this package.

    Raises:
        InputError: if ``model`` looks like a path and there is no such folder.
    """
    if model.startswith(DEMO_PREFIX):
        return str(_DEMO_FOLDER / model.removeprefix(DEMO_PREFIX))
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"model {model!r}: no such folder: expected a folder or a hub id like 'owner/name'")
    return model


def weights_sha256(module: torch.nn.Module) -> str:
    """Returns a hash of a module's parameters and buffers: of their names, types, shapes and bytes.

    Independent of how the weights were stored and found; two models of equal hash and precision give equal results.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(memoryview(values.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
