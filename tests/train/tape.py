"""What a CUDA graph is on a GPU, on a CPU: PyTorch's operations, recorded with their memory and done again on it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.pass_graphs import CudaRecorder, Recorder


class Tape(TorchDispatchMode):
    """Records operations that compute; those that only look at memory in another way need no second time."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value: a graph cannot"
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def play(self) -> None:
        """Does all operations again; their results come to the memory where they were."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for work in tree_leaves(again):
                if hasattr(work, "wait") and not isinstance(work, Tensor):
                    work.wait()
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class TapeRecorder:
    """A recorder for CPUs. Unlike a GPU's it computes while it records; what that writes is undone by the launch."""

    def __init__(self) -> None:
        self.recorded = self.played = self.given_back = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            work()
        self.recorded += 1

        def play() -> None:
            self.played += 1
            tape.play()

        return play

    def give_memory_back(self) -> None:
        self.given_back += 1


def recorder_for(device: torch.device) -> Recorder:
    """Returns what records on a device: on a GPU what the trainer takes."""
    return CudaRecorder() if device.type == "cuda" else TapeRecorder()
