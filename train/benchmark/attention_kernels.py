# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""``python -m train.benchmark attention``: kernels for attention within frames and among all tokens, side by side.

Each at head dim 72, forward and with the backward pass: PyTorch's kernels, the packages that are installed,
FlashAttention 3's backward pass after cuDNN's forward pass, and cuDNN with heads padded by zeros, whose copies count.
Errors are those of the first sample, of its output and of the gradients of q, k and v, against float32 on the same
bfloat16 values: the largest one, in units of the reference's root mean square. TFLOP/s are of the products without
padding, the backward pass counted as twice the forward pass.

Letters: B samples, N tokens, H heads, D width of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import InputError
from train.benchmark.attention_choice import ATTENTION_NAMES
from train.benchmark.gpu_time import gpu_milliseconds
from train.benchmark.results import make_room, write_results
from train.model.attention import PACKAGES, AttentionBackend, attention, installed_packages
from train.model.flash_attention_3 import flash_attention_3

_HEADS, _HEAD_WIDTH = 16, 72
_SHAPES = ((512, 128), (256, 256), (64, 1024), (32, 2048), (2, 4096), (1, 65536))
_PADDED_WIDTHS = (80, 96, 128)
_OF_PYTORCH: tuple[AttentionBackend, ...] = ("cudnn", "flash")
_BASELINE = ATTENTION_NAMES["cudnn"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBenchmark:
    """Measures kernels for attention within frames and among all tokens at head dim 72, with their errors."""

    output: Path | None = None
    """A JSON file for the results; the table stands beside it, with .md."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRow:
    """What one kernel takes at one size. The figures of one that failed are None."""

    samples: int
    tokens: int
    way: str
    forward_us: float | None = None
    both_us: float | None = None
    """Forward and backward."""
    forward_tflops: float | None = None
    both_tflops: float | None = None
    output_error: float | None = None
    """Of the first sample: the largest, by the reference's root mean square."""
    gradient_error: float | None = None
    """The same of the gradients of queries, keys and values: the largest of the three."""
    failure: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """Inputs of attention, the gradient of its output, and what float32 makes of the first sample."""

    inputs: list[Tensor]
    """Queries, keys and values, each (B, N, H, D)."""
    grad: Tensor
    reference: list[Tensor]
    """Output and the gradients of the inputs, each (1, N, H, D)."""

    @classmethod
    def random(cls, B: int, N: int, H: int, D: int, device: str) -> "AttentionCase":
        """Returns normal values in bfloat16."""
        tensors = [torch.randn(B, N, H, D, device=device, dtype=torch.bfloat16) for _ in range(4)]
        inputs, grad = [t.requires_grad_() for t in tensors[:3]], tensors[3]
        return cls(inputs=inputs, grad=grad, reference=reference(*(t.detach()[:1] for t in tensors)))


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code.

    Raises:
        InputError: without a GPU.
    """
    config = tyro.cli(AttentionBenchmark, prog="python -m train.benchmark attention", args=arguments)
    make_room(config.output)
    if not torch.cuda.is_available():
        raise InputError("attention: expected a CUDA device, found none")
    torch.manual_seed(0)
    cases = [AttentionCase.random(B, N, _HEADS, _HEAD_WIDTH, "cuda") for B, N in _SHAPES]
    kernels = ways()  # packages last, and all sizes of one before the next: a kernel that breaks CUDA breaks no others
    rows = [measure_row(name, attend, case, gpu_milliseconds) for name, attend in kernels.items() for case in cases]
    rows.sort(key=lambda row: _SHAPES.index((row.samples, row.tokens)))
    text = table(rows)
    print(text)
    if config.output is not None:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        values = {"machine": machine, "missing": missing(), "rows": [asdict(row) for row in rows]}
        write_results(config.output, values, text)
    return 0


def missing() -> list[str]:
    """Returns the names of the packages that are not installed."""
    return [ATTENTION_NAMES[name] for name in PACKAGES if name not in installed_packages()]


def ways() -> dict[str, Attend]:
    """Returns the kernels to compare, by name."""

    def by(backend: AttentionBackend) -> Attend:
        return lambda q, k, v: attention(q, k, v, backend=backend)

    def padded_to(width: int) -> Attend:
        return lambda q, k, v: padded_attention(q, k, v, width, SDPBackend.CUDNN_ATTENTION)

    kernels = {ATTENTION_NAMES[name]: by(name) for name in _OF_PYTORCH}
    kernels |= {f"{_BASELINE}, padded to {width}": padded_to(width) for width in _PADDED_WIDTHS}
    for name in installed_packages():
        kernels[ATTENTION_NAMES[name]] = by(name)
        if name == "flash-attn-3":
            kernels[f"{ATTENTION_NAMES[name]}, forward by cuDNN"] = partial(flash_attention_3, by_cudnn=True)
    return kernels


def padded_attention(
    q: Float[Tensor, "B N H D"], k: Float[Tensor, "B N H D"], v: Float[Tensor, "B N H D"], width: int, by: SDPBackend
) -> Float[Tensor, "B N H D"]:
    """Returns softmax(q k^T / sqrt(D)) v, computed with heads that zeros make ``width`` wide."""
    D = q.shape[-1]
    q, k, v = (F.pad(t, (0, width - D)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(by):
        out = F.scaled_dot_product_attention(q, k, v, scale=D**-0.5)
    return out.transpose(1, 2)[..., :D]


def reference(
    q: Float[Tensor, "B N H D"],
    k: Float[Tensor, "B N H D"],
    v: Float[Tensor, "B N H D"],
    grad: Float[Tensor, "B N H D"],
    *,
    scores: int = 2**27,
) -> list[Tensor]:
    """Returns softmax(q k^T / sqrt(D)) v and the gradients of q, k and v, in float32, operation by operation.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        grad: Of the output.
        scores: How many scores are held at a time.
    """
    results = [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (q, q, k, v)]
    queries = max(scores // k.shape[1], 1)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys, values = (t[b, :, h].float().requires_grad_() for t in (k, v))
            for begin in range(0, q.shape[1], queries):
                part = slice(begin, begin + queries)
                of_part = q[b, part, h].float().requires_grad_()
                out = (of_part @ keys.T * q.shape[-1] ** -0.5).softmax(-1) @ values
                out.backward(grad[b, part, h].float())
                assert of_part.grad is not None
                results[0][b, part, h], results[1][b, part, h] = out.detach(), of_part.grad
            assert keys.grad is not None
            assert values.grad is not None
            results[2][b, :, h], results[3][b, :, h] = keys.grad, values.grad
    return results


def measure_row(
    way: str, attend: Attend, case: AttentionCase, milliseconds: Callable[[Callable[[], object]], float]
) -> AttentionRow:
    """Returns the row of one kernel at one size.

    Args:
        way: The kernel's name.
        attend: Computes attention from queries, keys and values.
        case: The inputs.
        milliseconds: Returns how long a call takes.
    """
    B, N, H, D = case.grad.shape

    def forward() -> None:
        with torch.no_grad():
            attend(*case.inputs)

    def both() -> list[Tensor]:
        out = attend(*case.inputs)
        return [out.detach(), *torch.autograd.grad(out, case.inputs, case.grad)]

    try:
        errors = [
            float((found[:1].float() - wanted).abs().max() / wanted.square().mean().sqrt())
            for found, wanted in zip(both(), case.reference, strict=True)
        ]
        forward_ms, both_ms = milliseconds(forward), milliseconds(both)
    except (RuntimeError, ImportError, OSError) as error:  # a shape that it refuses, or a package that is broken
        return AttentionRow(samples=B, tokens=N, way=way, failure=str(error).partition("\n")[0])
    gigaflop = 4 * B * N * N * H * D / 1e9
    return AttentionRow(
        samples=B,
        tokens=N,
        way=way,
        forward_us=forward_ms * 1000,
        both_us=both_ms * 1000,
        forward_tflops=gigaflop / forward_ms,
        both_tflops=3 * gigaflop / both_ms,
        output_error=errors[0],
        gradient_error=max(errors[1:]),
    )


def table(rows: Sequence[AttentionRow]) -> str:
    """Returns the rows as Markdown, and which packages are not installed."""
    lines = ["| samples x tokens | kernel | forward, µs | TFLOP/s | with backward, µs | TFLOP/s | cuDNN takes |"]
    lines[0] += " largest error | of gradients |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    baseline = {(row.samples, row.tokens): row.both_us for row in rows if row.way == _BASELINE}
    for row in rows:
        of_cudnn = baseline.get((row.samples, row.tokens))
        cells = [f"{row.samples} x {row.tokens:,}", row.way]
        cells += [_figure(row.forward_us, ",.0f"), _figure(row.forward_tflops, ".0f")]
        cells += [_figure(row.both_us, ",.0f"), _figure(row.both_tflops, ".0f")]
        cells += [_figure(of_cudnn / row.both_us if of_cudnn and row.both_us else None, ".2f")]
        cells += [_figure(row.output_error, ".3f"), _figure(row.gradient_error, ".3f")]
        if row.failure is not None:
            cells[2:] = [f"failed: {row.failure}".replace("|", "/"), *[""] * 6]
        lines.append(f"| {' | '.join(cells)} |")
    if absent := missing():
        lines += ["", f"Not installed, so not measured: {', '.join(absent)}."]
    return "\n".join(lines)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
