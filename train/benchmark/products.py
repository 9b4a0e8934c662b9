"""``python -m train.benchmark products``: products by the algorithm of :mod:`train.ops.products` beside PyTorch's.

A GPU that has just begun has power to spare, and over a training step it has not. So it is heated first, and both ways
run in turns, in windows long enough for its clock to settle.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from shared.errors import InputError
from train.benchmark.results import make_room, write_results
from train.ops.products import linear_product, product
from train.ops.reference import reference_operations

_WIDTH = 1152
_LINEAR = {
    "qkv": (_WIDTH, 3 * _WIDTH),
    "proj": (_WIDTH, _WIDTH),
    "fc1": (_WIDTH, 4 * _WIDTH),
    "fc2": (4 * _WIDTH, _WIDTH),
}
"""Inputs and outputs of the linear layers of a block of XL/2."""
_WITHOUT_BIAS = "fc1"
"""The kernel of the GELU adds it."""
_HEATING_SECONDS = 2.0
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductsBenchmark:
    """Measures the products of XL/2 over tokens, forward and for the gradients of inputs, under steady load."""

    rows: tuple[int, ...] = (16384, 32768, 65536, 131072)
    """Tokens."""
    seconds: float = 0.2
    """Of a window, of which each way has three. Longer ones differ less."""
    output: Path | None = None
    """A JSON file for the results; the table stands beside it, with .md."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductRow:
    """What a product of some rows takes, both ways."""

    product: str
    rows: int
    ours_ms: float
    pytorch_ms: float
    times_as_fast: float
    """The median of windows beside each other."""
    equal: bool
    """Bit for bit."""


Way = Callable[[], Tensor]


def _products(rows: int, device: torch.device) -> Sequence[tuple[str, Callable[[], Way]]]:
    """Returns each product by its name, and what makes its matrices and returns how it is computed."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def forward(name: str) -> Way:
        inputs, outputs = _LINEAR[name]
        x, weight = normal(rows, inputs), normal(outputs, inputs)
        bias = None if name == _WITHOUT_BIAS else normal(outputs)
        return lambda: linear_product(x, weight, bias)

    def backward(name: str) -> Way:
        inputs, outputs = _LINEAR[name]
        grad, weight = normal(rows, outputs), normal(outputs, inputs)
        return lambda: product(grad, weight)

    makers = [(name, partial(forward, name)) for name in _LINEAR]
    return makers + [(f"{name}, gradient of inputs", partial(backward, name)) for name in _LINEAR]


def _window(way: Way, times: int, device: torch.device) -> float:
    """Returns milliseconds a call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            way()
        return (time.perf_counter() - begin) * 1000 / times
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(times // 4):  # until the clock has settled
        way()
    first.record()
    for _ in range(times):
        way()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / times


def _pytorchs(way: Way) -> Way:
    def run() -> Tensor:
        with reference_operations(("products",)):
            return way()

    return run


def measure(rows: int, seconds: float, device: torch.device) -> list[ProductRow]:
    """Returns a row of each product.

    Args:
        rows: Tokens.
        seconds: Of a window.
        device: Whose.
    """
    found = []
    for name, make in _products(rows, device):
        ours = make()
        pytorchs = _pytorchs(ours)
        equal = torch.equal(ours(), pytorchs())
        times = max(4, round(1000 * seconds / _window(pytorchs, 4, device)))
        windows = [(_window(pytorchs, times, device), _window(ours, times, device)) for _ in range(_ROUNDS)]
        theirs, own = (statistics.median(column) for column in zip(*windows, strict=True))
        ratio = statistics.median(before / after for before, after in windows)
        found.append(
            ProductRow(product=name, rows=rows, ours_ms=own, pytorch_ms=theirs, times_as_fast=ratio, equal=equal)
        )
    return found


def table(rows: list[ProductRow]) -> str:
    """Returns Markdown."""
    lines = ["| product | rows | PyTorch, ms | ours, ms | times as fast | bits |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.product} | {row.rows:,} | {row.pytorch_ms:.3f} | {row.ours_ms:.3f} | {row.times_as_fast:.3f} | "
        f"{'equal' if row.equal else 'DIFFERENT'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the benchmark with command-line ``arguments``."""
    config = tyro.cli(ProductsBenchmark, args=arguments, prog="python -m train.benchmark products")
    if not torch.cuda.is_available():
        raise InputError("products are measured on a GPU: found none")
    make_room(config.output)
    device = torch.device("cuda", torch.cuda.current_device())
    square = torch.randn(8192, 8192, device=device).bfloat16()
    end = time.perf_counter() + _HEATING_SECONDS
    while time.perf_counter() < end:
        for _ in range(10):
            square @ square
        torch.cuda.synchronize()
    rows = [row for count in config.rows for row in measure(count, config.seconds, device)]
    text = table(rows)
    print(text)
    if config.output is not None:
        machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
        write_results(config.output, {**machine, "products": [asdict(row) for row in rows]}, text)
    return 0
