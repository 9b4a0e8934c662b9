"""FlashAttention 3: whose library of kernels there is, and its kernels as operators of PyTorch's, with their gradients.

Two libraries have them, of the same operators: that of the package ``flash_attn_3``, and the one that xformers 0.0.34
was published with. Both use PyTorch's stable interface only, so they run with versions of PyTorch that they were not
built with; of xformers, whose other parts do not, nothing else is loaded. The library in xformers before that was bound
to one version of PyTorch; after that there is none. Either may be built for CUDA 12, whose runtime PyTorch for CUDA 13
leaves out; the package that brings it is then loaded first.

The libraries' own operators have no shapes for tensors without content and no gradients. Ours have both: they do not
break a compiled graph, and selective checkpointing keeps their results by name.

What the backward pass reads of the forward pass, its output and the logarithm of each query's sum, cuDNN's kernel
returns too. So the forward pass may be cuDNN's, which is faster for short sequences, and the backward pass
FlashAttention 3's.

Letters: B batch, N queries, M keys, H heads, D width of a head, Z sequences end to end.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import InputError

_PACKAGE = "flash_attn_3"
_XFORMERS = "0.0.34"
_CUDA_12 = "libcudart.so.12"
_CUDA_12_RUNTIME = f"nvidia/cuda_runtime/lib/{_CUDA_12}"
"""Where nvidia-cuda-runtime-cu12 has it."""


@cache
def find_library() -> Path | None:
    """Returns the library that is installed, FlashAttention 3's own before that of xformers; None without either."""
    found = _files_of(_PACKAGE, "_C*.so")
    with suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("xformers").split("+")[0] == _XFORMERS:
            found += _files_of("xformers", "flash_attn_3/_C*.so")
    return found[0] if found else None


def _files_of(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return [path for folder in folders for path in sorted(Path(folder).glob(pattern))]


@torch.compiler.assume_constant_result
def usable(device: torch.device) -> bool:
    """Whether a GPU is of the kind that FlashAttention 3 is for, and its library loads; warns if only that fails."""
    if device.type != "cuda" or find_library() is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    failure = _failure()
    if failure is not None:
        _warn(failure)
    return failure is None


def takes_heads(width: int) -> bool:
    """Whether there are kernels for heads of a width."""
    return width % 8 == 0 and width <= 256


@cache
def _warn(failure: str) -> None:
    warnings.warn(f"attention runs without FlashAttention 3: {failure}", RuntimeWarning, stacklevel=3)


@cache
def _failure() -> str | None:
    """Loads the library, which registers its operators. Returns why that failed, or None."""
    if hasattr(torch.ops.flash_attn_3, "fwd"):  # by whoever else uses it
        return None
    library = find_library()
    if library is None:
        return f"neither {_PACKAGE} nor xformers {_XFORMERS} is installed"
    try:
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            if _CUDA_12 not in str(error):
                raise
            runtimes = [path for folder in sys.path for path in Path(folder).glob(_CUDA_12_RUNTIME)]
            if not runtimes:
                raise
            ctypes.CDLL(str(runtimes[0]))
            ctypes.CDLL(str(library))
    except OSError as error:
        hint = "; pip install nvidia-cuda-runtime-cu12 brings it" if _CUDA_12 in str(error) else ""
        return f"{library} was not loaded: {error}{hint}"
    return None


def kernels() -> Any:
    """Returns the library's operators.

    Raises:
        InputError: if it is missing or was not loaded.
    """
    failure = _failure()
    if failure is not None:
        raise InputError(f"attention backend 'flash-attn-3': {failure}")
    return torch.ops.flash_attn_3


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cuDNN's attention of (B, N, H, D), in the order in memory of q without gaps, and the logarithms of the
    queries' sums, (B, H, N)."""
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True
    )
    return out.transpose(1, 2), sums.reshape(out.shape[:3])


@torch.compiler.assume_constant_result
def cudnn_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether cuDNN, as it is installed and allowed, has attention for heads of a width on a GPU."""
    return device.type == "cuda" and _cudnn_takes(device, dtype, head_width)


@cache
def _cudnn_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    some = torch.empty(1, 1, 128, head_width, device=device, dtype=dtype)
    parameters = torch.backends.cuda.SDPAParams(some, some, some, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


@torch.library.custom_op("latentmill_attention::flash_attention_3", mutates_args=())
def _flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_borders: Tensor | None,
    key_borders: Tensor | None,
    longest_queries: int | None,
    longest_keys: int | None,
    by_cudnn: bool,
) -> tuple[Tensor, Tensor]:
    if by_cudnn:
        return cudnn_forward(q, k, v)
    out = torch.empty_like(q)
    _, sums, *_ = kernels().fwd(
        q,
        k,
        v,
        out=out,
        cu_seqlens_q=query_borders,
        cu_seqlens_k=key_borders,
        max_seqlen_q=longest_queries,
        max_seqlen_k=longest_keys,
        softmax_scale=q.shape[-1] ** -0.5,
        num_splits=1,
    )
    return out, sums


@_flash_attention_3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, query_borders: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    *sequences, H, _D = q.shape
    sums = (H, *sequences) if query_borders is not None else (sequences[0], H, sequences[1])
    return torch.empty_like(q), q.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("latentmill_attention::flash_attention_3_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_borders: Tensor | None,
    key_borders: Tensor | None,
    out: Tensor,
    sums: Tensor,
    longest_queries: int | None,
    longest_keys: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    kernels().bwd(
        grad,
        q,
        k,
        v,
        out,
        sums,
        dq=dq,
        dk=dk,
        dv=dv,
        cu_seqlens_q=query_borders,
        cu_seqlens_k=key_borders,
        max_seqlen_q=longest_queries,
        max_seqlen_k=longest_keys,
        softmax_scale=q.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest_queries, ctx.longest_keys, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _sums_grad: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *inputs, out, sums = ctx.saved_tensors
    grads = _backward(_laid_out_as(out, grad), *inputs, out, sums, ctx.longest_queries, ctx.longest_keys)
    return *grads, None, None, None, None, None


def _laid_out_as(out: Tensor, grad: Tensor) -> Tensor:
    same = all(size == 1 or one == two for size, one, two in zip(out.shape, out.stride(), grad.stride(), strict=True))
    return grad if same else torch.empty_like(out).copy_(grad)


_flash_attention_3.register_autograd(_differentiate, setup_context=_keep)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, *, by_cudnn: bool = False) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v, (B, N, H, D), of queries (B, N, H, D), keys and values (B, M, H, D).

    They may lie apart in memory, as views of one tensor of all three do; only the values of a head must be neighbours.
    Output and gradients have the order in memory of what they belong to, without gaps.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        by_cudnn: Whether the forward pass is cuDNN's.

    Raises:
        InputError: if the library is missing or was not loaded.
    """
    return _flash_attention_3(*_neighbours(q, k, v), None, None, None, None, by_cudnn)[0]


def flash_attention_3_of_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    longest_queries: int,
    longest_keys: int,
) -> Tensor:
    """Returns the same of Z sequences of several lengths, end to end: (sum of N, H, D).

    Args:
        q: (sum of N, H, D).
        k: (sum of M, H, D).
        v: (sum of M, H, D).
        query_borders: (Z + 1,) int32: where the queries of each sequence begin, and where the last one's end.
        key_borders: The same of keys and values.
        longest_queries: Most queries of a sequence.
        longest_keys: Most keys of a sequence.

    Raises:
        InputError: if the library is missing or was not loaded.
    """
    borders = query_borders, key_borders
    return _flash_attention_3(*_neighbours(q, k, v), *borders, longest_queries, longest_keys, False)[0]


def _neighbours(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
