# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The one place that computes attention: every model calls :func:`attention`.

The backends are an explicit list. Without a request, :func:`automatic_backend` takes the first of
:func:`preferred_backends`, whose order is by measurement (docs/training_speed.md); of PyTorch's own kernels, PyTorch
takes the first that can compute the shape at hand. A backend asked for by name is used or is an error: it is never
replaced silently.

Captions are ragged: each sample sees its own valid caption tokens only. Kernels with a mask get a mask. Kernels for
sequences of several lengths read keys and values where they lie: the padding of a sample becomes a sequence of its own
that nobody queries, so nothing is packed and nothing waits for the device to count.

Queries, keys and values of one product stay one tensor as long as they can: joining the gradients of its parts is a
pass over memory, and copies into the order of the sequences are two more.

Letters: B batch, N queries, M keys, H heads, D width of a head, S sequences whose tokens are interleaved.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import InputError
from train.model import flash_attention_3
from train.model.flash_attention_3_packed import flash_attention_3_packed
from train.ops import caption_attention_op
from train.ops.head_parts import fits_tiles
from train.ops.packed import taken_apart
from train.ops.reference import kernel_wanted

AttentionBackend = Literal["flash-attn-3", "flash-attn", "cudnn", "flash", "efficient", "math"]
"""The first two are packages; the others are kernels of PyTorch's scaled_dot_product_attention."""

PACKAGES: tuple[AttentionBackend, ...] = ("flash-attn-3", "flash-attn")
"""FlashAttention 3, for Hopper, by either of the libraries of ``flash_attention_3.py``; and 2."""

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

_HALF = (torch.bfloat16, torch.float16)

_LONG = 128
"""Queries and keys from which on FlashAttention 3, with the better forward pass, is not slower than cuDNN. Forward and
backward, at head dim 72 on one H200, cuDNN takes 0.99, 1.04, 1.00, 1.07 and 1.17 times as long at 96, 128, 256, 1,024
and 2,048 of them."""

_LONG_PACKED = 96
"""The same where they are one product: gradients of cuDNN's have to be joined, FlashAttention 3's do not. On one H200
cuDNN with that takes 1.16 times as long at 96 of them, 1.24 at 128, 1.12 at 256, and 1.00 at 66."""

_MOST_BY_CUDNN = 1024
"""Queries up to which the forward pass may be cuDNN's though the backward pass is FlashAttention 3's."""
_CUDNN_TILE, _FLASH_3_TILE = 128, 192
"""Queries that a program takes, the latter for heads up to 96 wide. Where tiles are as full, cuDNN's forward pass takes
0.95 times as long as FlashAttention 3's at 384 tokens and 1.2 times at 1,536; so the fuller tiles win: 0.57 at 128,
0.60 at 256, 0.93 at 512, 0.99 at 1,024, but 1.16 at 192 (one H200, head dim 72)."""
_MOST_FLASH_3_TILE_WIDTH = 96


class KeyMask(NamedTuple):
    """Which keys each sample sees: its first ones. Made once a forward pass, shared by all layers."""

    mask: Bool[Tensor, "B M"]
    """True at the keys that are seen."""
    borders: Int[Tensor, " 2*B+1"]
    """Where, among the keys of all samples end to end, those seen and those not seen begin, in turn; and the end."""

    @classmethod
    def valid_first(cls, valid: Bool[Tensor, "B M"] | Int[Tensor, "B M"]) -> tuple["KeyMask", Int[Tensor, "B M"]]:
        """Returns the mask, and the order of keys that it is for: those that are seen before the others.

        Args:
            valid: Nonzero at the keys that are seen.
        """
        mask, order = valid.bool().sort(dim=1, descending=True, stable=True)
        B, M = mask.shape
        begins = torch.arange(0, B * M, M, device=mask.device)
        borders = torch.stack([begins, begins + mask.sum(dim=1)], dim=1).flatten()
        return cls(mask, F.pad(borders, (0, 1), value=B * M).to(torch.int32)), order


@cache
def _installed() -> frozenset[AttentionBackend]:
    found: dict[AttentionBackend, bool] = {
        "flash-attn-3": flash_attention_3.find_library() is not None,
        "flash-attn": importlib.util.find_spec("flash_attn") is not None,
    }
    return frozenset(name for name, installed in found.items() if installed)


@torch.compiler.assume_constant_result
def installed_packages() -> tuple[AttentionBackend, ...]:
    """Returns those of :data:`PACKAGES` that are installed."""
    return tuple(name for name in PACKAGES if name in _installed())


def preferred_backends(
    device_type: str, dtype: torch.dtype, *, masked: bool, flash_3_suits: bool = False
) -> tuple[AttentionBackend, ...]:
    """Returns the backends that exist for a device and a dtype, the fastest first.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: Of queries, keys and values.
        masked: Whether the samples see different keys.
        flash_3_suits: Whether FlashAttention 3 is for the device, has kernels for the heads' width, and is faster.
    """
    if device_type == "cpu":
        return ("flash", "math")
    if dtype not in _HALF:
        return ("efficient", "math")
    packages = installed_packages()
    if masked:
        return ("cudnn", "efficient", *packages, "flash", "math")
    if "flash-attn-3" in packages and flash_3_suits:
        return ("flash-attn-3", "cudnn", *packages[1:], "flash", "efficient", "math")
    return ("cudnn", *packages, "flash", "efficient", "math")  # FlashAttention 2 takes 1.5 times as long as cuDNN


def automatic_backend(
    device: torch.device, dtype: torch.dtype, *, length: int, head_width: int, packed: bool
) -> AttentionBackend:
    """Returns the backend that attention without a mask takes where none is asked for.

    Args:
        device: Of queries, keys and values.
        dtype: Theirs.
        length: Queries or keys of a sequence, whichever are fewer.
        head_width: Values of a head.
        packed: Whether they are one product's, as it gave them.
    """
    is_long = length >= (_LONG_PACKED if packed else _LONG)
    suits = dtype in _HALF and is_long and flash_attention_3.takes_heads(head_width)
    return preferred_backends(
        device.type, dtype, masked=False, flash_3_suits=suits and flash_attention_3.usable(device)
    )[0]


def automatic_choice(device: torch.device, dtype: torch.dtype, *, head_width: int, packed: bool) -> str:
    """Returns what :func:`automatic_backend` takes for short and for long sequences, in words for a log."""
    lengths = 1, _LONG_PACKED if packed else _LONG
    short, long = (automatic_backend(device, dtype, length=n, head_width=head_width, packed=packed) for n in lengths)
    if short == long:
        return short
    words = f"{short}, {long} from {lengths[1]:,} tokens on"
    if _forward_by_cudnn(device, dtype, lengths[1], head_width):
        words += f" (forward by cudnn up to {_MOST_BY_CUDNN:,} where its tiles are fuller)"
    return words


def _forward_by_cudnn(device: torch.device, dtype: torch.dtype, queries: int, head_width: int) -> bool:
    """Whether the forward pass of attention by FlashAttention 3, not asked for by name, is cuDNN's."""
    is_fuller = head_width <= _MOST_FLASH_3_TILE_WIDTH and -queries % _CUDNN_TILE < -queries % _FLASH_3_TILE
    return queries <= _MOST_BY_CUDNN and is_fuller and flash_attention_3.cudnn_takes(device, dtype, head_width)


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
    backend: AttentionBackend | None = None,
) -> Float[Tensor, "B N H D"]:
    """Returns softmax(q k^T / sqrt(D)) v.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        backend: The kernel to use; None chooses one.

    Raises:
        InputError: if ``backend`` does not exist for the tensors' device and dtype.
    """
    if backend is not None:
        require_backend(backend, "cuda" if q.is_meta else q.device.type, q.dtype)
    if q.is_meta:
        return _without_content(q, k, v, None, backend)
    by_cudnn = False
    if backend is None:
        length, head_width = min(q.shape[1], k.shape[1]), q.shape[-1]
        chosen = automatic_backend(q.device, q.dtype, length=length, head_width=head_width, packed=False)
        backend = chosen if chosen in PACKAGES else None
        by_cudnn = backend == "flash-attn-3" and _forward_by_cudnn(q.device, q.dtype, q.shape[1], head_width)
    if backend == "flash-attn-3":
        return flash_attention_3.flash_attention_3(q, k, v, by_cudnn=by_cudnn)
    if backend == "flash-attn":
        out: Tensor = importlib.import_module("flash_attn").flash_attn_func(q, k, v)
        return out
    return _sdpa(q, k, v, None, backend)


def packed_attention(
    qkv: Float[Tensor, "B N 3 H D"], *, backend: AttentionBackend | None = None
) -> Float[Tensor, "B N H D"]:
    """Returns softmax(q k^T / sqrt(D)) v.

    Args:
        qkv: Queries, keys and values as one product gives them.
        backend: The kernel to use; None chooses one.

    Raises:
        InputError: if ``backend`` does not exist for the tensor's device and dtype.
    """
    if _flash_3_takes(qkv, backend):
        return _by_flash_3(qkv.unsqueeze(2), backend).squeeze(2)
    return attention(*taken_apart(qkv), backend=backend)


def interleaved_packed_attention(
    qkv: Float[Tensor, "B N S 3 H D"], *, backend: AttentionBackend | None = None
) -> Float[Tensor, "B N S H D"]:
    """Returns the same along the second dimension: of each sample and each of its S sequences."""
    if _flash_3_takes(qkv, backend):
        return _by_flash_3(qkv, backend)
    return interleaved_attention(*taken_apart(qkv), backend=backend)


def interleaved_attention(
    q: Float[Tensor, "B N S H D"],
    k: Float[Tensor, "B N S H D"],
    v: Float[Tensor, "B N S H D"],
    *,
    backend: AttentionBackend | None = None,
) -> Float[Tensor, "B N S H D"]:
    """Returns what :func:`interleaved_packed_attention` does, of queries, keys and values apart.

    Kernels are given views: their outputs and gradients have the order in memory of what they belong to. Samples go one
    by one, as no strides express the sequences of several.
    """
    if q.shape[0] == 1:  # past PyTorch's unbind, whose gradient is a copy
        return _one_interleaved(q.squeeze(0), k.squeeze(0), v.squeeze(0), backend).unsqueeze(0)
    return torch.stack([_one_interleaved(*sample, backend) for sample in zip(q, k, v, strict=True)])


def _one_interleaved(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend | None) -> Tensor:
    """Returns (N, S, H, D) of as much."""
    return attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), backend=backend).transpose(0, 1)


def _flash_3_takes(qkv: Tensor, backend: AttentionBackend | None) -> bool:
    """Whether a product goes to FlashAttention 3 as it is; what a GPU keeps of it is counted from its parts."""
    if qkv.is_meta:
        return False
    if backend is None:
        length, head_width = qkv.shape[1], qkv.shape[-1]
        backend = automatic_backend(qkv.device, qkv.dtype, length=length, head_width=head_width, packed=True)
    else:
        require_backend(backend, qkv.device.type, qkv.dtype)
    return backend == "flash-attn-3"


def _by_flash_3(qkv: Tensor, backend: AttentionBackend | None) -> Tensor:
    by_cudnn = backend is None and _forward_by_cudnn(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[-1])
    return flash_attention_3_packed(qkv, by_cudnn=by_cudnn)


def caption_attention(
    q: Float[Tensor, "B N H D"],
    kv: Float[Tensor, "B M 2 H D"],
    keys: KeyMask | None,
    *,
    backend: AttentionBackend | None = None,
) -> Float[Tensor, "B N H D"]:
    """Returns softmax(q k^T / sqrt(D)) v, each sample over its own keys.

    Args:
        q: Queries.
        kv: Keys and values, as one product gives them.
        keys: The keys that each sample sees; all of them if None.
        backend: The kernel to use; None chooses one.

    Raises:
        InputError: if ``backend`` does not exist for the tensors' device and dtype.
    """
    if backend is None and kernel_wanted("captions", q) and fits_tiles(q.shape[-1]):
        return caption_attention_op.caption_attention(q, kv, None if keys is None else keys.borders)
    k, v = kv.unbind(2)
    if keys is None:
        return attention(q, k, v, backend=backend)
    if backend is not None:
        require_backend(backend, "cuda" if q.is_meta else q.device.type, q.dtype)
    if backend == "flash-attn-3" or (q.is_meta and backend in ("flash-attn", "flash")):  # all keep as much
        return _varlen(flash_attention_3.flash_attention_3_of_lengths, q, k, v, keys)
    if backend == "flash-attn":
        return _varlen(importlib.import_module("flash_attn").flash_attn_varlen_func, q, k, v, keys)
    if q.is_meta:
        return _without_content(q, k, v, keys.mask[:, None, None, :], backend)
    if backend == "flash" and q.is_cuda:
        return _varlen(importlib.import_module("torch.nn.attention.varlen").varlen_attn, q, k, v, keys)
    return _sdpa(q, k, v, keys.mask[:, None, None, :], backend)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: AttentionBackend | None) -> Tensor:
    if backend is not None:
        kernels = [_SDPA[backend]]
    else:
        names = preferred_backends(q.device.type, q.dtype, masked=mask is not None)
        kernels = [_SDPA[name] for name in names if name in _SDPA]
    with sdpa_kernel(kernels, set_priority=len(kernels) > 1):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def _without_content(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: AttentionBackend | None) -> Tensor:
    """Returns a tensor of the result's shape; its graph keeps what the kernel that a GPU would use keeps."""
    if backend == "math":
        return _sdpa(q, k, v, mask, backend)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = None if mask is None else mask.to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1)
    if q.dtype not in _HALF or backend == "efficient":
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
    elif backend in (None, "cudnn"):
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[0]
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2)


def _varlen(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, keys: KeyMask) -> Tensor:
    """Returns the attention of a kernel for sequences end to end: each sample's keys, then its padding, unqueried."""
    B, N = q.shape[:2]
    queries = torch.arange(0, (B + 1) * N, N, dtype=torch.int32, device=q.device)
    query_borders = queries.repeat_interleave(2)[1:]  # 0, N, N, 2N, 2N, ...
    out: Tensor = kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), query_borders, keys.borders, N, k.shape[1])
    return out.view_as(q)
