"""T5-XXL's products of many tokens, by the algorithm of cuBLASLt that does most of them at Hopper's limit of power.

Tiles of 256 x 128, two of which share what they load, do more than those that PyTorch takes: with cuBLAS 13.1, 15,360
tokens on an H100 under steady load, 2.1 % more of the product of ``wo``, 1.7 % of that of q, k and v, and 0.8 % of that
of ``o`` (docs/encoder_speed.md). For other widths and few tokens that is not known, and PyTorch's are taken; so they
are where cuBLASLt does not offer the algorithm, which is where the last tiles would leave much of the GPU idle.

T tokens, K inputs, N outputs.
"""

from typing import Any

import torch
from torch import Tensor

from shared.cublaslt import Algorithm, Product, find_product, may_multiply

LEAST_TOKENS = 8192
"""Of a batch, for the algorithm to be used."""

WIDTHS = ((4096, 12288), (4096, 4096), (10240, 4096))
"""K and N of q, k and v together, ``o`` and ``wo`` of T5-XXL, which it is used for."""

ALGORITHM = Algorithm(tile=24, cluster=5, custom=7)
"""256 x 128, 1 x 2."""


def why_pytorchs(config: Any, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Returns why all products are PyTorch's, or None if those of many tokens may be by the algorithm.

    Args:
        config: Of the model.
        dtype: Of its weights.
        capability: CUDA's, of the GPU; None where Triton does not run.
    """
    if capability != (9, 0):
        return f"compute capability {capability} is not (9, 0)"
    if dtype != torch.bfloat16:
        return f"{dtype} is not torch.bfloat16"
    width, attended = config.d_model, config.num_heads * config.d_kv
    widths = (width, 3 * attended), (attended, width), (config.d_ff, width)
    return None if widths == WIDTHS else f"widths {widths} are not T5-XXL's {WIDTHS}"


class Products:
    """The products of tokens with weights (N, K), but the inner one.

    Args:
        chosen: Whether the algorithm is used for many tokens; only where :func:`why_pytorchs` gives None.
    """

    def __init__(self, *, chosen: bool) -> None:
        self._chosen = chosen

    def find(self, tokens: Tensor, weight: Tensor, *, adds: bool) -> Product | None:
        """Returns what multiplies tokens (T, K) by the algorithm; None where PyTorch does."""
        N, K = weight.shape
        if not self._chosen or len(tokens) < LEAST_TOKENS:
            return None
        if tokens.device.index != torch.cuda.current_device() or not may_multiply(tokens, weight):
            return None
        return find_product(tokens.device, (len(tokens), K, N), ALGORITHM, transposed=True, adds=adds)

    def multiply(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Returns ``tokens weight^T`` (T, N)."""
        found = self.find(tokens, weight, adds=False)
        if found is None:
            return tokens @ weight.t()
        out = tokens.new_empty(len(tokens), len(weight))
        found(tokens, weight, out)
        return out

    def add(self, hidden: Tensor, tokens: Tensor, weight: Tensor) -> None:
        """Adds ``tokens weight^T`` to contiguous hidden states (T, N), in float32 and rounded once."""
        found = self.find(tokens, weight, adds=True)
        if found is None:
            hidden.addmm_(tokens, weight.t())
        else:
            found(tokens, weight, hidden)
