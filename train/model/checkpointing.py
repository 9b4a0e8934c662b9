"""What a block keeps for its backward pass: everything, the results of its products, or its inputs alone.

``selective`` keeps what is dear to compute (matrix products, attention) and computes the element-wise rest again, which
costs little time and about halves the memory. ``full`` computes all of it again. Blocks may differ: the first ones save
more, for the backward pass comes to them last, when what the others kept has been given back.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shared.errors import InputError
from train.ops.cpu_bfloat16 import checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "full"]

ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)

_KEPT_OPERATIONS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)
"""Operations of PyTorch whose results ``selective`` keeps."""
_KEPT_NAMESPACES = ("flash_attn", "torch_attn", "latentmill_attention")
"""Libraries of operators of which ``selective`` keeps all results: attention kernels."""


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0] if isinstance(operation, torch._ops.OpOverload) else ""
    kept = name in _KEPT_OPERATIONS or name.split("::")[0] in _KEPT_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Both:
    """Two contexts as one."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._inner.__exit__(*exception)
        self._outer.__exit__(*exception)


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    forward, recomputation = checkpoint_contexts()
    keep, reuse = _kept_contexts()
    return _Both(forward, keep), _Both(recomputation, reuse)


_kept_contexts = partial(create_selective_checkpoint_contexts, _policy)


def require_checkpointing(name: str) -> None:
    """Raises :class:`InputError` unless ``name`` is a way of checkpointing."""
    if name not in ACTIVATION_CHECKPOINTING:
        raise InputError(f"activation_checkpointing={name!r}: expected one of {', '.join(ACTIVATION_CHECKPOINTING)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputation:
    """What the blocks of a model compute again in the backward pass.

    Raises:
        InputError: for an unknown way of checkpointing, or blocks with ``none``, beside which none keeps more.
    """

    mode: ActivationCheckpointing
    """What the first ``blocks`` do."""
    blocks: int | None = None
    """Those after them keep more: beside ``full`` what ``selective`` keeps, beside ``selective`` everything. None: all
    do the same."""

    def __post_init__(self) -> None:
        require_checkpointing(self.mode)
        if self.blocks is not None and self.mode == "none":
            raise InputError(f"checkpointed_blocks={self.blocks} does nothing with activation_checkpointing=none")

    def of_each(self, num_blocks: int) -> list[ActivationCheckpointing]:
        """Returns what each of a model's blocks does, in their order.

        Raises:
            InputError: if the model has fewer blocks.
        """
        if self.blocks is None:
            return [self.mode] * num_blocks
        if not 0 < self.blocks <= num_blocks:
            raise InputError(
                f"checkpointed_blocks={self.blocks}: the model has {num_blocks} blocks: use 1 to {num_blocks}"
            )
        rest: ActivationCheckpointing = "selective" if self.mode == "full" else "none"
        return [self.mode] * self.blocks + [rest] * (num_blocks - self.blocks)

    def __str__(self) -> str:
        if self.blocks is None:
            return self.mode
        rest = ", selective in the others" if self.mode == "full" else ""
        return f"{self.mode} in {self.blocks} block{'s' * (self.blocks > 1)}{rest}"


def checkpointed(function: Callable[..., Any], mode: ActivationCheckpointing) -> Callable[..., Any]:
    """Returns ``function`` so that its backward pass keeps what ``mode`` says. Without gradients it is as it was."""
    if mode == "none":
        return function
    if torch.compiler.is_compiling():  # where products are as the device has them
        plain = partial(checkpoint, function, use_reentrant=False)
        return partial(plain, context_fn=_kept_contexts) if mode == "selective" else plain
    contexts = _selective_contexts if mode == "selective" else checkpoint_contexts
    return partial(checkpoint, function, use_reentrant=False, context_fn=contexts)
