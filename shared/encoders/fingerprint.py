"""Naming a model's weights by a hash."""

import hashlib

import torch


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
