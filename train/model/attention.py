# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The one place that computes attention: every model calls :func:`attention`.

The backends are an explicit list. Without a request, PyTorch takes the first of :func:`preferred_backends` that can
compute the shape at hand; the order is by measurement at head dim 72 on one H200 (cuDNN is 1.5 times as fast as
FlashAttention 2 there). A backend asked for by name is used or is an error: it is never replaced silently.

Captions are ragged: each sample sees its own valid caption tokens only. Kernels with a mask get a mask; kernels without
one get the valid keys packed end to end, and the borders between the samples.

Letters: B batch, N queries, M keys, H heads, D width of a head.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import InputError

AttentionBackend = Literal["flash-attn", "cudnn", "flash", "efficient", "math"]
"""flash-attn is the package of that name; the others are kernels of PyTorch's scaled_dot_product_attention."""

ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KeyMask:
    """Which keys each sample sees. Made once a forward pass, shared by all layers."""

    mask: Bool[Tensor, "B M"]
    """True at the keys that are seen."""

    @cached_property
    def packed_positions(self) -> Int[Tensor, " P"]:
        """The positions of the valid keys in the keys flattened over (B, M)."""
        return self.mask.flatten().nonzero().squeeze(1)

    @cached_property
    def borders(self) -> Int[Tensor, " B+1"]:
        """Where each sample's keys begin among the packed ones, and the end."""
        return F.pad(self.mask.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)


def preferred_backends(device_type: str, dtype: torch.dtype, *, masked: bool) -> tuple[AttentionBackend, ...]:
    """Returns the backends that exist for a device and a dtype, the fastest first.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: Of queries, keys and values.
        masked: Whether the samples see different keys.
    """
    if device_type == "cpu":
        return ("flash", "math")
    if dtype not in _HALF:
        return ("efficient", "math")
    with_package: tuple[AttentionBackend, ...] = (
        ("flash-attn",) if importlib.util.find_spec("flash_attn") is not None else ()
    )
    if masked:
        return ("cudnn", "efficient", *with_package, "flash", "math")
    return ("cudnn", *with_package, "flash", "efficient", "math")


def require_backend(name: AttentionBackend, device_type: str, dtype: torch.dtype) -> None:
    """Checks that a backend exists for a device and a dtype.

    Raises:
        InputError: if it does not, naming those that do.
    """
    available = preferred_backends(device_type, dtype, masked=False)
    if name not in available:
        raise InputError(
            f"attention backend {name!r} is not available on {device_type} in {str(dtype).removeprefix('torch.')}: "
            f"use one of {', '.join(available)}, or none for the automatic choice"
        )


def attention(
    q: Float[Tensor, "B N H D"],
    k: Float[Tensor, "B M H D"],
    v: Float[Tensor, "B M H D"],
    *,
    keys: KeyMask | None = None,
    backend: AttentionBackend | None = None,
) -> Float[Tensor, "B N H D"]:
    """Returns softmax(q k^T / sqrt(D)) v, each sample over its own keys.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        keys: The keys that each sample sees; all of them if None.
        backend: The kernel to use; None chooses one.

    Raises:
        InputError: if ``backend`` does not exist for the tensors' device and dtype.
    """
    if backend is not None:
        require_backend(backend, "cuda" if q.is_meta else q.device.type, q.dtype)
    if q.is_meta:
        return _without_content(q, k, v, keys, backend)
    if backend == "flash-attn":
        return _flash_attn(q, k, v, keys)
    if backend == "flash" and keys is not None and q.is_cuda:
        return _torch_varlen(q, k, v, keys)
    if backend is not None:
        kernels = [_SDPA[backend]]
    else:
        names = preferred_backends(q.device.type, q.dtype, masked=keys is not None)
        kernels = [_SDPA[name] for name in names if name in _SDPA]
    mask = None if keys is None else keys.mask[:, None, None, :]
    with sdpa_kernel(kernels, set_priority=len(kernels) > 1):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _without_content(q: Tensor, k: Tensor, v: Tensor, keys: KeyMask | None, backend: AttentionBackend | None) -> Tensor:
    """Returns a tensor of the result's shape; its graph keeps what the kernel that a GPU would use keeps."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = None if keys is None else keys.mask.to(q.dtype)[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
    if q.dtype not in _HALF or backend == "efficient":
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
    elif backend in (None, "cudnn"):
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[0]
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, keys: KeyMask) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """Returns queries and valid keys and values end to end, where each sample's begin, and the longest of each."""
    packed_k, packed_v = (t.flatten(0, 1).index_select(0, keys.packed_positions) for t in (k, v))
    B, N = q.shape[:2]
    query_borders = torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=q.device)
    return q.flatten(0, 1), packed_k, packed_v, query_borders, keys.borders, N, k.shape[1]


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, keys: KeyMask) -> Tensor:
    varlen = importlib.import_module("torch.nn.attention.varlen")  # for CUDA only
    out: Tensor = varlen.varlen_attn(*_packed(q, k, v, keys))
    return out.view_as(q)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, keys: KeyMask | None) -> Tensor:
    package = importlib.import_module("flash_attn")  # optional: the `gpu` extra
    out: Tensor
    if keys is None:
        out = package.flash_attn_func(q, k, v)
    else:
        out = package.flash_attn_varlen_func(*_packed(q, k, v, keys))
    return out.view_as(q)
