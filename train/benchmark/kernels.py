"""``python -m train.benchmark kernels``: each Triton kernel beside PyTorch, eager and compiled, and beside copying.

Times are of the GPU alone, from graphs of many calls. Bytes are those that must move: each input read once, each output
and gradient written once; captions count products instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from shared.errors import InputError
from train.benchmark.gpu_time import gpu_milliseconds
from train.benchmark.results import make_room, write_results
from train.model.attention import AttentionBackend, KeyMask, caption_attention
from train.ops.gelu import bias_gelu
from train.ops.modulation import gate_add, gate_add_norm_modulate, norm_modulate
from train.ops.qk_norm import qk_norm
from train.ops.reference import reference_operations
from train.ops.time_attention import time_attention

_HEADS, _HEAD_WIDTH, _WIDTH = 16, 72, 1152
_COPY_VALUES = 2**28

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelBenchmark:
    """Measures each kernel at the sizes of STDiT-XL/2, forward and with the backward pass."""

    output: Path | None = None
    """A JSON file for the results; the table stands beside it, with .md."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelRow:
    """What one way of one operation takes."""

    operation: str
    way: str
    forward_us: float
    both_us: float
    """Forward and backward."""
    gigabytes_per_second: float | None
    """Of forward and backward; None for captions."""
    tflops: float | None
    """Of forward and backward, for captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """An operation with its inputs and the gradients of its outputs."""

    name: str
    operation: Operation
    inputs: list[Tensor]
    grads: list[Tensor]
    moved_bytes: float | None = None
    flop: float | None = None


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code.

    Raises:
        InputError: without a GPU.
    """
    config = tyro.cli(KernelBenchmark, prog="python -m train.benchmark kernels", args=arguments)
    make_room(config.output)
    if not torch.cuda.is_available():
        raise InputError("kernels: expected a CUDA device, found none")
    torch.manual_seed(0)
    copy = _copy_gigabytes_per_second()
    rows = [
        row
        for case in [*_time_cases(), *_modulation_cases(), _gelu_case(), *map(_qk_norm_case, (16_384, 32_768))]
        for row in _measure(case)
    ]
    rows += [row for tokens, batch, padded in ((4096, 8, 120), (4096, 8, 300), (16384, 2, 120))
             for row in _measure_captions(tokens, batch, padded)]  # fmt: skip
    text = _table(rows, copy)
    print(text)
    if config.output is not None:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        values = {"machine": machine, "copy_gigabytes_per_second": copy, "rows": [asdict(row) for row in rows]}
        write_results(config.output, values, text)
    return 0


def _random(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def _time_cases() -> list[_Case]:
    cases = []
    for B, T, S in ((8, 16, 256), (2, 16, 1024), (1, 64, 1024)):
        for of_stdit3 in (False, True):
            angles = torch.rand(T, _HEAD_WIDTH // 2, device="cuda")
            rope = (angles.cos(), angles.sin()) if of_stdit3 else None

            def operation(qkv: Tensor, *norms: Tensor, rope: Any = rope) -> Tensor:
                q_norm, k_norm = norms or (None, None)
                return time_attention(qkv, q_norm=q_norm, k_norm=k_norm, rope=rope)

            norms = [_random(_HEAD_WIDTH), _random(_HEAD_WIDTH)] if of_stdit3 else []
            cases.append(
                _Case(
                    name=f"along time, {B} x {T} frames x {S}" + (", qk-norm and RoPE" if of_stdit3 else ""),
                    operation=operation,
                    inputs=[_random(B, T, S, 3, _HEADS, _HEAD_WIDTH), *norms],
                    grads=[_random(B, T, S, _HEADS, _HEAD_WIDTH, grad=False)],
                    moved_bytes=11 * B * T * S * _WIDTH * 2,  # q, k, v, o; then q, k, v, and four gradients
                )
            )
    return cases


def _modulation_cases(B: int = 8, T: int = 16, S: int = 256) -> list[_Case]:
    of_one = B * T * S * _WIDTH * 2
    operations: list[tuple[str, Operation, int, int]] = [
        ("norm and modulation", lambda x, t: norm_modulate(x, t[:, 1], t[:, 2]), 1, 5),
        ("gated sum", lambda x, h, t: gate_add(x, h, t[:, 0]), 1, 6),
        ("gated sum, norm, modulation", lambda x, h, t: gate_add_norm_modulate(x, h, t[:, 0], t[:, 1], t[:, 2]), 2, 10),
        ("sum, norm, modulation", lambda x, h, t: gate_add_norm_modulate(x, h, None, t[:, 1], t[:, 2]), 2, 8),
    ]
    return [
        _Case(
            name=name,
            operation=operation,
            inputs=[_random(B, T, S, _WIDTH) for _ in range(2 - (index == 0))] + [_random(B, 3, 1, _WIDTH)],
            grads=[_random(B, T, S, _WIDTH, grad=False) for _ in range(outputs)],
            moved_bytes=moved * of_one,
        )
        for index, (name, operation, outputs, moved) in enumerate(operations)
    ]


def _gelu_case(N: int = 32_768, width: int = 4 * _WIDTH) -> _Case:
    return _Case(
        name="bias and GELU",
        operation=bias_gelu,
        inputs=[_random(N, width), _random(width)],
        grads=[_random(N, width, grad=False)],
        moved_bytes=5 * N * width * 2,
    )


def _qk_norm_case(tokens: int) -> _Case:
    return _Case(
        name=f"qk-norm, {tokens:,} tokens",
        operation=qk_norm,
        inputs=[_random(tokens, 3, _HEADS, _HEAD_WIDTH), _random(_HEAD_WIDTH), _random(_HEAD_WIDTH)],
        grads=[_random(tokens, _HEADS, _HEAD_WIDTH, grad=False) for _ in range(3)],
        moved_bytes=12 * tokens * _WIDTH * 2,  # q, k, both normed; then q, k, three gradients, and three for the packed
    )


def _measure(case: _Case) -> list[KernelRow]:
    def plain(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        with reference_operations():
            return case.operation(*inputs)

    torch.compiler.reset()
    with reference_operations():  # while it is traced
        compiled = torch.compile(case.operation)
        compiled(*case.inputs)
        row_compiled = _row(case, "PyTorch, compiled", compiled)
    return [_row(case, "ours", case.operation), _row(case, "PyTorch", plain), row_compiled]


def _measure_captions(N: int, B: int, M: int, valid: int = 120) -> list[KernelRow]:
    keys, _ = KeyMask.valid_first((torch.arange(M, device="cuda") < valid).expand(B, -1))
    q, kv = _random(B, N, _HEADS, _HEAD_WIDTH), _random(B, M, 2, _HEADS, _HEAD_WIDTH)
    rows = []
    ways: list[tuple[str, AttentionBackend | None]] = [("ours", None), ("cuDNN", "cudnn"), ("flash varlen", "flash")]
    for way, backend in ways:
        case = _Case(
            name=f"to captions, {B} x {N} queries, {valid} keys of {M}",
            operation=lambda q, kv, backend=backend: caption_attention(q, kv, keys, backend=backend),
            inputs=[q, kv],
            grads=[_random(B, N, _HEADS, _HEAD_WIDTH, grad=False)],
            flop=3 * 4 * valid * _WIDTH * B * N,
        )
        rows.append(_row(case, way, case.operation))
    return rows


def _row(case: _Case, way: str, operation: Operation) -> KernelRow:
    def forward() -> None:
        with torch.no_grad():
            operation(*case.inputs)

    def both() -> None:
        torch.autograd.grad(operation(*case.inputs), case.inputs, case.grads)

    forward_ms, both_ms = gpu_milliseconds(forward), gpu_milliseconds(both)
    return KernelRow(
        operation=case.name,
        way=way,
        forward_us=forward_ms * 1000,
        both_us=both_ms * 1000,
        gigabytes_per_second=None if case.moved_bytes is None else case.moved_bytes / both_ms / 1e6,
        tflops=None if case.flop is None else case.flop / both_ms / 1e9,
    )


def _copy_gigabytes_per_second() -> float:
    source = _random(_COPY_VALUES, grad=False)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return 2 * source.numel() * source.element_size() / gpu_milliseconds(run) / 1e6


def _table(rows: Sequence[KernelRow], copy: float) -> str:
    lines = [f"Copying moves {copy:,.0f} GB/s.", ""]
    lines += ["| operation | way | forward, µs | with backward, µs | GB/s | TFLOP/s | ours is faster by |"]
    lines += ["|---|---|---|---|---|---|---|"]
    ours = {row.operation: row for row in rows if row.way == "ours"}
    for row in rows:
        moved = "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:,.0f}"
        tflops = "" if row.tflops is None else f"{row.tflops:.0f}"
        faster = f"{row.both_us / ours[row.operation].both_us:.2f}"
        times = f"{row.forward_us:.0f} | {row.both_us:.0f}"
        lines.append(f"| {row.operation} | {row.way} | {times} | {moved} | {tflops} | {faster} |")
    return "\n".join(lines)
