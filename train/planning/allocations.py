"""How much memory a computation holds at once, counted while it runs on tensors without content.

On PyTorch's ``meta`` device operations compute shapes alone, the real autograd graph among them: what it keeps for the
backward pass, what is temporary, and when each is given back, follow from the code itself.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_GRANULE = 512
"""Bytes to which PyTorch's CUDA allocator rounds every block up."""


class Allocations(TorchDispatchMode):
    """Within it, storages of tensors on ``meta`` that come and go are counted.

    Attributes:
        counts_only: For :func:`train.ops.launching.would_launch_directly`.
        live: Bytes that are held now, without what was held before.
        peak: Most bytes that were held at once.
    """

    counts_only = True

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, *tensors: Tensor) -> None:
        """Takes it that the storages of ``tensors`` are counted elsewhere."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def hold(self, num_bytes: int) -> None:
        """Counts bytes that something else holds from now on."""
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor) and each.is_meta:
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = -(-storage.nbytes() // _GRANULE) * _GRANULE
        self._known.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._give_back, key, num_bytes)

    def _give_back(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes
