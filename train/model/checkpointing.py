"""What a block keeps for its backward pass: everything, the results of its products, of its attention, or none of it.

``selective`` keeps what is dear to compute (matrix products, attention) and computes the element-wise rest again, which
costs little time and about halves the memory. ``attention`` keeps the block's input and what is dearest for its bytes:
the results of attention to many tokens, whose cost grows with how many they are, and of the MLP's second product, which
sums over four times as many values as others. ``full`` keeps the input alone. All but ``full`` keep what other ranks
have sent. Blocks may differ: the first ones save more, for the backward pass comes to them last, when what the others
kept has been given back.
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

ActivationCheckpointing = Literal["none", "selective", "attention", "full"]

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Of a forward pass and of its recomputation."""

ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
"""From keeping all to keeping least."""

_EXCHANGES = "latentmill_exchange"
"""Operators whose results have come from other ranks."""
_PRODUCTS = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "latentmill_float8::linear", "aten::_scaled_mm"}
)
"""The last is what ``latentmill_float8::linear`` is made of, seen on tensors without content alone."""
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
)
"""PyTorch's kernels. Its ``math`` is products, and among these ``selective`` keeps it."""
_ATTENTION_LIBRARIES = frozenset({"flash_attn", "torch_attn", "latentmill_attention"})
"""Libraries all of whose operators are attention."""
_BOUND_BY_MEMORY = frozenset(
    {
        "latentmill_attention::time_attention",
        "latentmill_attention::caption_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
"""Attention to few keys, of short sequences of frames or of captions: as cheap for its bytes as products are, so that
``attention`` computes it again (the table in docs/models.md)."""
_KEYS_BY = {
    "aten::_scaled_dot_product_cudnn_attention": "attn_bias",
    "aten::_scaled_dot_product_efficient_attention": "attn_bias",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attn_mask",
    "latentmill_attention::flash_attention_3": "key_borders",
}
"""Of kernels that attend to captions too, the argument that says which keys a sample sees: only captions have it."""


def _is_bound_by_memory(name: str, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is attention to few keys."""
    if name in _KEYS_BY:
        named = kwargs | {known.name: given for known, given in zip(operation._schema.arguments, args, strict=False)}
        return named.get(_KEYS_BY[name]) is not None
    return name in _BOUND_BY_MEMORY


def _sums_over_many(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation is a product whose sums go over more values than twice the width of its result."""
    if name == "latentmill_float8::linear":
        outputs, inputs = args[3].shape
    elif name == "aten::_scaled_mm":
        inputs, outputs = args[1].shape
    elif name in ("aten::mm", "aten::addmm"):
        inputs, outputs = args[-1].shape
    else:
        return False
    return bool(inputs > 2 * outputs)


def _policy(keeps_products: bool, _context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split(".")[0] if isinstance(operation, torch._ops.OpOverload) else ""
    kept = name in _ATTENTION or name.split("::")[0] in (*_ATTENTION_LIBRARIES, _EXCHANGES)
    if keeps_products:
        kept = kept or name in _PRODUCTS
    else:
        kept = (kept and not _is_bound_by_memory(name, operation, args, kwargs)) or _sums_over_many(name, args)
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


_KEPT = {
    "selective": partial(create_selective_checkpoint_contexts, partial(_policy, True)),
    "attention": partial(create_selective_checkpoint_contexts, partial(_policy, False)),
}
"""Contexts of the forward pass, which keep results, and of the recomputation, which take them, by mode."""


def _with_same_products(kept: Contexts) -> Contexts:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        forward, recomputation = checkpoint_contexts()
        keep, reuse = kept()
        return _Both(forward, keep), _Both(recomputation, reuse)

    return contexts


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
    """Those after them do what keeps the next more: beside ``full`` ``attention``, beside ``attention`` ``selective``,
    beside ``selective`` ``none``. None: all do the same."""

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
        return [self.mode] * self.blocks + [self._rest] * (num_blocks - self.blocks)

    @property
    def _rest(self) -> ActivationCheckpointing:
        return ACTIVATION_CHECKPOINTING[ACTIVATION_CHECKPOINTING.index(self.mode) - 1]

    def __str__(self) -> str:
        if self.blocks is None:
            return self.mode
        rest = f", {self._rest} in the others" if self._rest != "none" else ""
        return f"{self.mode} in {self.blocks} block{'s' * (self.blocks > 1)}{rest}"


def checkpointed(function: Callable[..., Any], mode: ActivationCheckpointing) -> Callable[..., Any]:
    """Returns ``function`` so that its backward pass keeps what ``mode`` says. Without gradients it is as it was.

    It must draw nothing at random, as no block does: computed again, it would draw anew.
    """
    if mode == "none":
        return function
    kept = _KEPT.get(mode)
    if torch.compiler.is_compiling():  # where products are as the device has them
        plain = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return plain if kept is None else partial(plain, context_fn=kept)
    contexts = checkpoint_contexts if kept is None else _with_same_products(kept)
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
