"""T5's inner product with its gated GELU as one Triton kernel, for Hopper GPUs.

cuBLAS writes gate and linear (T, 2F) to memory for another kernel to read; this one keeps them in registers and writes
(T, F). A tile is 128 tokens by 128 columns of the gate and the 128 of linear beside them, so that one program holds
both halves of what it multiplies: one box of the weights as they are, gate above linear, brought by the tensor memory
accelerator. As many programs as the GPU has multiprocessors take tiles in turns, and fetch for the next tile while they
write the one before. They go through a group of a few rows of tiles column by column: most weights and tokens are then
found in the L2 cache.

T tokens of a batch, W width of the model, F inner width of the feed-forward layer.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shared.encoders.fast_t5 import GATED_COLUMNS, GATED_DEPTH
from shared.encoders.t5_kernels import rms_norm

ROWS = 128
"""Tokens of a tile."""
GROUP = 12
"""Rows of tiles of a group. The 132 programs of a Hopper then take 12 by 11 tiles at a time, which read 4,352 rows of
tokens and weights, where 8 by 16.5 read 5,248."""


@triton.jit(do_not_specialize=["tokens"])
def _gated_product(  # type: ignore[no-untyped-def]
    x, weights, out, tokens, inner,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(tokens, ROWS), tl.cdiv(inner, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, PROGRAMS, flatten=True):
        first = tile // (GROUP * wide) * GROUP
        height = min(high - first, GROUP)
        within = tile % (GROUP * wide)
        row, column = (first + within % height) * ROWS, within // height * COLUMNS
        sums = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for k in range(0, WIDTH, DEPTH):
            both = tl.reshape(weights.load([0, column, k]), (2 * COLUMNS, DEPTH))
            sums = tl.dot(x.load([row, k]), both.T, sums)
        gate, linear = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        # gelu by tanh, as in t5_kernels
        gelu = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        out.store([row, column], (gelu * linear).to(out.dtype))


class GatedWeights:
    """The inner products of all layers, over the weights as they lie in memory.

    Args:
        layers: Weights (2F, W) of each layer, gate above linear; all of one shape, F and W multiples of
            :data:`GATED_COLUMNS` and :data:`GATED_DEPTH`.
        programs: How many run at a time: as many as the GPU has multiprocessors.
    """

    def __init__(self, layers: Sequence[Tensor], *, programs: int) -> None:
        self._programs = programs
        self._layers = [
            TensorDescriptor.from_tensor(weights.view(2, -1, weights.shape[1]), [2, GATED_COLUMNS, GATED_DEPTH])
            for weights in layers
        ]

    def of_pass(self, tokens: int) -> "GatedPass":
        """Returns the products of a pass over so many tokens; they are described to the GPU once for all layers."""
        return GatedPass(tokens, self._layers, self._programs)


class GatedPass:
    """What :meth:`GatedWeights.of_pass` returns."""

    def __init__(self, tokens: int, layers: Sequence[TensorDescriptor], programs: int) -> None:
        _, inner, width = layers[0].shape
        weights = layers[0].base
        self._normed, self._out = weights.new_empty(tokens, width), weights.new_empty(tokens, inner)
        self._layers, self._programs = layers, programs
        self._at_normed = TensorDescriptor.from_tensor(self._normed, [ROWS, GATED_DEPTH])
        self._at_out = TensorDescriptor.from_tensor(self._out, [ROWS, GATED_COLUMNS])
        self._grid = (min(programs, triton.cdiv(tokens, ROWS) * (inner // GATED_COLUMNS)),)

    def __call__(self, layer: int, hidden: Tensor, norm: Tensor, epsilon: float) -> Tensor:
        """Returns ``gelu(gate) * linear`` (T, F) of a layer, by tanh and rounded once; it holds until the next call.

        Args:
            layer: Whose weights.
            hidden: (T, W); gate and linear are products with its root-mean-square norm.
            norm: Weights of the norm.
            epsilon: Of the norm.
        """
        rms_norm(hidden, norm, epsilon, out=self._normed)
        _gated_product[self._grid](
            self._at_normed, self._layers[layer], self._at_out, *self._out.shape,
            WIDTH=self._normed.shape[1], ROWS=ROWS, COLUMNS=GATED_COLUMNS, DEPTH=GATED_DEPTH,
            GROUP=GROUP, PROGRAMS=self._programs, num_warps=8, num_stages=3,
        )  # fmt: skip
        return self._out
