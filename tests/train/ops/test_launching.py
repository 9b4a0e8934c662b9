"""How kernels are launched again: a stand-in for Triton says which launches it had to choose a kernel for.

Others have what lies inside Triton 3.6, and 3.7 to 3.9, on a GPU, where ``test_kernels.py`` has the same of Triton
itself.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.ops.launching import Launch, entry, launches_directly


class Kernel:
    """Like one of Triton's: called with a grid and all arguments, it returns what launches the same again."""

    def __init__(self, *, interpreted: bool = False, of_triton: "Triton | None" = None) -> None:
        self.interpreted, self.triton = interpreted, of_triton
        self.chosen: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def choose(*arguments: Any, **options: int) -> Any:
            self.chosen.append((grid, arguments, options))
            return None if self.interpreted else Compiled(self)

        return choose


class Compiled:
    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        if kernel.triton is not None:
            self.run = kernel.triton.launcher

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.again.append((grid, arguments))


def _tensor(begin: int = 0) -> Tensor:
    whole = torch.empty(64, dtype=torch.uint8)
    return whole[-whole.data_ptr() % 16 + begin :][:8]


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def test_a_kernel_is_chosen_once_and_launched_with_the_same_numbers_from_then_on() -> None:
    kernel, tensors = Kernel(), (_tensor(), None, _tensor())
    launch = Launch(kernel, (3, 2), (7, 0.5), (32, True), num_warps=4)
    for _ in range(3):
        launch(*tensors)
    numbers = (7, 0.5, 32, True)
    assert kernel.chosen == [((3, 2, 1), (*tensors, *numbers), {"num_warps": 4})]
    assert kernel.again == [((3, 2, 1), (*_addresses(*tensors), *numbers))] * 2


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


@dataclass
class CudaLauncher:
    """As Triton 3.6 has one for each kernel."""

    launched: list[tuple[Any, ...]] = field(default_factory=list)
    global_scratch_size: int = 0
    profile_scratch_size: int = 0
    launch_cooperative_grid: bool = False
    launch_pdl: bool = True
    gsan_enabled: bool = False  # from 3.8 on

    def __post_init__(self) -> None:
        self.launch = lambda *arguments: self.launched.append(arguments)

    def __call__(self, x: int, y: int, z: int, stream: Any, function: int, *rest: Any) -> None:
        how = self.launch_cooperative_grid, self.launch_pdl
        self.launch(x, y, z, stream, function, *how, "memory" if self.global_scratch_size else None, None, *rest)


class Newer(CudaLauncher):
    """As Triton has one from 3.7 on."""

    arg_annotations, kernel_signature = ["kernel", "kernel", "kernel", "kernel", "constant"], b"PPPi"

    def __call__(self, x: int, y: int, z: int, stream: Any, function: int, *rest: Any) -> None:
        how, (packed, launched, enter, leave, *arguments) = (self.launch_cooperative_grid, self.launch_pdl), rest
        forms = self.arg_annotations, self.kernel_signature
        watched = (77,) if self.gsan_enabled else ()
        self.launch(
            x, y, z, stream, function, *how, packed, launched, enter, leave, None, None, *forms, (*arguments, *watched)
        )


class Triton:
    """The modules of Triton that are looked into, and a kernel of its."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launcher: type[CudaLauncher] = CudaLauncher) -> None:
        self.stream = 5
        self.enter, self.leave = SimpleNamespace(calls=[]), SimpleNamespace(calls=[])
        self.launcher = launcher()
        runtime = SimpleNamespace(launch_enter_hook=self.enter, launch_exit_hook=self.leave)
        active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: (self.stream, device))
        self.nvidia = ModuleType("triton.backends.nvidia.driver")
        self.nvidia.__dict__.update(CudaLauncher=CudaLauncher)
        driver = ModuleType("triton.runtime.driver")
        driver.__dict__.update(driver=SimpleNamespace(active=active))
        triton = ModuleType("triton")
        triton.__dict__.update(knobs=SimpleNamespace(runtime=runtime))
        for module in (triton, self.nvidia, driver):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for package in ("triton.backends", "triton.backends.nvidia", "triton.runtime"):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))

    def launch_twice(self, *tensors: Tensor | None) -> tuple[Launch, Kernel]:
        kernel = Kernel(of_triton=self)
        launch = Launch(kernel, (3, 2), (7,), (32,))
        launch(*tensors)
        launch(*tensors)
        assert len(kernel.chosen) == 1
        return launch, kernel


@pytest.mark.parametrize("launcher", [CudaLauncher, Newer], ids=["3.6", "3.7"])
def test_a_kernel_is_launched_again_by_tritons_c_function_on_the_stream_of_the_moment(
    launcher: type[CudaLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton, tensors = Triton(monkeypatch, launcher), (_tensor(), None, _tensor())
    launch, kernel = triton.launch_twice(*tensors)
    triton.stream = 6
    launch(*tensors)
    arguments, kernel_is = (*_addresses(*tensors), 7, 32), (11, False, True)
    if launcher is Newer:
        rest = (*kernel_is, (4, 1, 0), *[None] * 5, Newer.arg_annotations, Newer.kernel_signature, arguments)
    else:
        rest = (*kernel_is, None, None, (4, 1, 0), None, None, None, *arguments)
    assert triton.launcher.launched == [(3, 2, 1, (stream, 3), *rest) for stream in (5, 6)]
    assert not kernel.again


@pytest.mark.parametrize("launcher", [CudaLauncher, Newer], ids=["3.6", "3.7"])
def test_a_profilers_hooks_are_called_by_triton_itself_also_if_they_come_later(
    launcher: type[CudaLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = Triton(monkeypatch, launcher)
    launch, kernel = triton.launch_twice(_tensor())
    for hook in (triton.enter, triton.leave):
        hook.calls.append("profiler")
        launch(_tensor())
        hook.calls.clear()
    launch(_tensor())
    assert (len(kernel.again), len(triton.launcher.launched)) == (2, 2)


class AnotherOrder(CudaLauncher):
    def __call__(self, x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        self.launch(stream, x, y, z, *rest)


class MoreArguments(CudaLauncher):
    def __call__(self, *rest: Any) -> None:
        self.launch(*rest, "more")


class ByName(CudaLauncher):
    def __call__(self, x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        self.launch(x, y, z, *rest, stream=stream)


class Twice(CudaLauncher):
    def __call__(self, *rest: Any) -> None:
        super().__call__(*rest)
        super().__call__(*rest)


@pytest.mark.parametrize("launcher", [AnotherOrder, MoreArguments, ByName, Twice])
def test_a_launcher_of_a_form_that_is_not_known_launches_by_itself(
    launcher: type[CudaLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = Triton(monkeypatch, launcher)
    _, kernel = triton.launch_twice(_tensor())
    assert (len(kernel.again), len(triton.launcher.launched)) == (1, 0)


@pytest.mark.parametrize(
    "what", ["launcher", "global memory", "memory of a profile", "watched", "missing", "no hooks", "no driver"]
)
@pytest.mark.parametrize("launcher", [CudaLauncher, Newer], ids=["3.6", "3.7"])
def test_a_triton_that_is_not_as_known_launches_by_itself(
    launcher: type[CudaLauncher], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = Triton(monkeypatch, launcher)
    if what == "launcher":
        triton.nvidia.__dict__["CudaLauncher"] = type("CudaLauncher", (), {})
    elif what == "global memory":
        triton.launcher.global_scratch_size = 128
    elif what == "memory of a profile":
        triton.launcher.profile_scratch_size = 128
    elif what == "watched":
        triton.launcher.gsan_enabled = True
    elif what == "missing":
        del triton.launcher.launch
    elif what == "no hooks":
        del triton.enter.calls
    else:
        monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", None)
    _, kernel = triton.launch_twice(_tensor())
    assert (len(kernel.again), len(triton.launcher.launched)) == (1, 0)


def test_the_short_way_into_a_node_of_the_graph_gives_the_gradients_of_the_long_one() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
            ctx.by = by
            return x * by

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.by, None

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out = entry(Scale)(x, 3.0)
    assert type(out.grad_fn) is type(Scale.apply(x, 3.0).grad_fn)
    assert out.tolist() == [3, 6]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [3, 3]


def test_pytorch_is_passed_by_only_where_nobody_looks_on() -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    assert launches_directly(_tensor())
    assert not launches_directly(_tensor().to("meta"))
    with Looks():
        assert not launches_directly(_tensor())
