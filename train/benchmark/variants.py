# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""One model run in several ways, so that a speed-up is a ratio of one process: as published, and with each fused part.

Letters: B batch, T frames, S tokens of a frame, D width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from train.model.attention import AttentionBackend
from train.model.attention_layers import CrossAttention
from train.model.float8 import compute_in_float8
from train.model.layout import Attend, TokenLayout, WholeLayout
from train.model.transformer import DiffusionTransformer
from train.ops.reference import KERNELS, Kernel, reference_operations


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to run a model."""

    name: str
    kernels: tuple[Kernel, ...]
    """Which of this project's kernels are used; the rest runs operation by operation."""
    backend: AttentionBackend | None
    """The kernel of attention in space and among all tokens; None chooses by shape."""
    transposes: bool = False
    """Whether tokens are copied between the orders of space and time, as the published code does."""
    float8: bool = False
    """Whether products over tokens are computed in 8 bits."""
    graphs: bool = False
    """Whether passes are launched as CUDA graphs; see :mod:`train.pass_graphs`."""


PLAIN = Variant(name="plain", kernels=(), backend="flash", transposes=True)
"""As the published code runs."""
FUSED = Variant(name="ours", kernels=KERNELS, backend=None)
"""As the trainer runs."""
FUSED_CUDNN = Variant(name="ours, cuDNN attention", kernels=KERNELS, backend="cudnn")
"""The same without FlashAttention 3."""
FUSED_PLAIN_PRODUCTS = Variant(
    name="ours, PyTorch's products", kernels=tuple(name for name in KERNELS if name != "products"), backend=None
)
"""The same with the algorithms that PyTorch chooses for products."""
FUSED_FLOAT8 = Variant(name="ours, FP8 products", kernels=KERNELS, backend=None, float8=True)
"""With ``--products float8``. MFU is of the bfloat16 peak, here too."""
FUSED_GRAPHS = Variant(name="ours, CUDA graphs", kernels=KERNELS, backend=None, graphs=True)
"""With ``--cuda-graphs``."""
FUSED_FLOAT8_GRAPHS = Variant(
    name="ours, FP8 products, CUDA graphs", kernels=KERNELS, backend=None, float8=True, graphs=True
)
"""With both."""


class _TransposingLayout(WholeLayout):
    """Copies the tokens into sequences along time, and back."""

    moves_along_time = True

    def along_time(self, x: Float[Tensor, "B T S D"], attend: Attend) -> Float[Tensor, "B T S D"]:
        B, T, S, D = x.shape
        along = x.transpose(1, 2).reshape(B * S, T, 1, D)
        return attend(along).reshape(B, S, T, D).transpose(1, 2).contiguous()


def _transposing_layout(_batch: int, _frames: int, _frame_tokens: int) -> TokenLayout:
    return _TransposingLayout()


@contextmanager
def running_as(model: DiffusionTransformer, variant: Variant) -> Iterator[None]:
    """Within it, a model of ``train.model`` runs as the variant says. On a CPU the backend stays as it was."""
    layout = model.layout_for
    backends = {module: module.backend for module in model.modules() if hasattr(module, "backend")}
    on_gpu = next(model.parameters()).is_cuda
    with ExitStack() as stack:
        stack.enter_context(reference_operations(tuple(name for name in KERNELS if name not in variant.kernels)))
        if variant.float8:
            compute_in_float8(model)
            stack.callback(compute_in_float8, model, wanted=False)
        if variant.transposes:
            model.layout_for = _transposing_layout
        for module in backends:
            by_kernel = not on_gpu or (isinstance(module, CrossAttention) and "captions" in variant.kernels)
            module.backend = None if by_kernel else variant.backend  # type: ignore[assignment]
        try:
            yield
        finally:
            model.layout_for = layout
            for module, backend in backends.items():
                module.backend = backend
