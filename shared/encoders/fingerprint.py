"""Naming a model's weights by a hash."""

import hashlib

import torch


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
