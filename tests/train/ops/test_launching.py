"""How kernels are launched again: a stand-in for Triton says which launches it had to choose a kernel for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.ops.launching import Launch, launches_directly


class Kernel:
    """Like one of Triton's: called with a grid and all arguments, it returns what launches the same again."""

    def __init__(self, *, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.chosen: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def choose(*arguments: Any, **options: int) -> Any:
            self.chosen.append((grid, arguments, options))
            return None if self.interpreted else Compiled(self)

        return choose


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.again.append((grid, arguments))


def _tensor(begin: int = 0) -> Tensor:
    whole = torch.empty(64, dtype=torch.uint8)
    return whole[-whole.data_ptr() % 16 + begin :][:8]


def test_a_kernel_is_chosen_once_and_launched_with_the_same_numbers_from_then_on() -> None:
    kernel, tensors = Kernel(), (_tensor(), None, _tensor())
    launch = Launch(kernel, (3, 2), (7, 0.5), (32, True), num_warps=4)
    for _ in range(3):
        launch(*tensors)
    arguments = (*tensors, 7, 0.5, 32, True)
    assert kernel.chosen == [((3, 2, 1), arguments, {"num_warps": 4})]
    assert kernel.again == [((3, 2, 1), arguments)] * 2


def test_tensors_that_do_not_begin_at_16_bytes_never_get_a_kernel_for_those_that_do() -> None:
    kernel = Kernel()
    launch = Launch(kernel, (1,), (), ())
    for begin in (0, 8, 0, 8):
        launch(_tensor(), _tensor(begin))
    assert (len(kernel.chosen), len(kernel.again)) == (3, 1)
    kernel = Kernel()
    launch = Launch(kernel, (1,), (), ())
    for begin in (8, 0, 0):
        launch(_tensor(begin))
    assert (len(kernel.chosen), len(kernel.again)) == (2, 1)


def test_tritons_interpreter_is_asked_each_time() -> None:
    kernel = Kernel(interpreted=True)
    launch = Launch(kernel, (1,), (), ())
    launch(_tensor())
    launch(_tensor())
    assert len(kernel.chosen) == 2


def test_pytorch_is_passed_by_only_where_nobody_looks_on() -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert launches_directly(_tensor())
    assert not launches_directly(_tensor().to("meta"))
    with Looks():
        assert not launches_directly(_tensor())
