"""Products of many rows, by the algorithm that does most of them at Hopper's limit of power.

Measured with cuBLAS 13.1 at the widths of the models here, 16,384 to 131,072 rows, on an H100 under steady load
(docs/performance_notes.md): tiles of 128 x 160 in place of PyTorch's 192 x 192 do up to a tenth more, each by itself
where results are narrow, in pairs where they are wide. With fewer rows, or a bias where sums are long, they gain
nothing. No bit of a result differs.

Letters: M rows, K inner size, N columns.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.cublaslt import Algorithm, Product, find_product, may_multiply
from train.ops.launching import launches_directly
from train.ops.reference import kernel_wanted

_TILE_128X160 = 29
_CLUSTER_1X1, _CLUSTER_2X1 = 2, 3
_ROWS_OFFERED = 8192
"""Multiples of so many rows cuBLASLt offers these for."""
_NARROW = Algorithm(tile=_TILE_128X160, cluster=_CLUSTER_1X1, custom=3)
_WIDE = Algorithm(tile=_TILE_128X160, cluster=_CLUSTER_2X1, custom=1)


def _choose(sizes: tuple[int, int, int], *, bias: bool) -> Algorithm | None:
    """Returns the better algorithm for a product; None where that is PyTorch's."""
    M, K, N = sizes
    if N >= 2 * K:
        return _WIDE if M >= 16384 else None
    if K <= N:
        return _NARROW if M >= 24576 else None
    return _NARROW if M >= 32768 and not bias else None


@lru_cache(maxsize=1024)
def _found(device: torch.device, sizes: tuple[int, int, int], transposed: bool, bias: bool) -> Product | None:
    algorithm = _choose(sizes, bias=bias)
    if algorithm is None or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    asked_rows = -(-sizes[0] // _ROWS_OFFERED) * _ROWS_OFFERED
    return find_product(device, sizes, algorithm, transposed=transposed, bias=bias, asked_rows=asked_rows)


def _try(a: Tensor, b: Tensor, N: int, bias: Tensor | None, *, transposed: bool) -> Tensor | None:
    if not (a.is_cuda and kernel_wanted("products", a) and launches_directly(a)):
        return None
    M, K = a.shape
    fits = b.shape == ((N, K) if transposed else (K, N)) and (bias is None or bias.shape == (N,))
    if not fits or b.device != a.device or a.device.index != torch.cuda.current_device():
        return None  # PyTorch says what is wrong, or computes elsewhere
    found = _found(a.device, (M, K, N), transposed, bias is not None)
    if found is None or not (may_multiply(a, b) and (bias is None or may_multiply(bias))):
        return None
    out = a.new_empty((M, N))
    found(a, b, out, bias)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a b`` of a (M, K) and b (K, N)."""
    out = _try(a, b, b.shape[1], None, transposed=False)
    return a.mm(b) if out is None else out


def linear_product(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``a weight^T + bias`` of a (M, K), weight (N, K) and bias (N,)."""
    out = _try(a, weight, weight.shape[0], bias, transposed=True)
    return F.linear(a, weight, bias) if out is None else out
