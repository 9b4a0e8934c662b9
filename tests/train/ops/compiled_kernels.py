"""What the installed Triton makes of our kernels for Hopper: ``python -m tests.train.ops.compiled_kernels [case ...]``.

No GPU is needed. Every kernel is compiled as the models launch it at their published sizes (16 heads of 72, width
1,152, bfloat16; T5-XXL; SD's autoencoder), and a table says what bounds how many of its programs are resident on a
multiprocessor. Another Triton, or another way to write a kernel, can change that: compare two tables.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
B, T, S, H, P, D = 8, 16, 256, 16, 72, 1152
N = B * T * S


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A kernel as it was compiled, and what a program of it takes of a multiprocessor."""

    case: str
    kernel: str
    warps: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""
    instructions: int
    cubin: bytes

    @property
    def resident(self) -> int:
        """Programs on a multiprocessor: 64 warps, four times 16,384 registers, 228 KiB, at most 32 programs.

        CUDA's ``cuda_occupancy.h``: a warp's registers come by 256, shared memory by 128 bytes, 1 KiB more a program.
        """
        by_registers = 16_384 // (-(-self.registers // 8) * 256) * 4
        by_shared = 228 * 1024 // (-(-self.shared // 128) * 128 + 1024)
        return min(32, min(64, by_registers) // self.warps, by_shared)


class _NoDevice:
    """All that Triton asks of a device before it loads a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _compiled(case: str, kernel: Any) -> Compiled:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(
        case=case,
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spilled=stack + local,
        shared=kernel.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE)),
        cubin=kernel.asm["cubin"],
    )


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _floats(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def _time_attention() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import time_attention_kernels as kernels

    for frames, places in ((16, 256), (20, 256), (32, 1024), (64, 1024)):
        shape = (1, frames, places, H, P)
        grad, qkv = _empty(*shape), _empty(*shape[:3], 3, H, P)
        norms, rope = (_empty(P), _empty(P)), (_floats(frames, P // 2), _floats(frames, P // 2))
        for name, prepared in (
            ("", (None,) * 4), (", norm", (*norms, None, None)), (", RoPE", (None, None, *rope)),
            (", norm, RoPE", (*norms, *rope)),
        ):  # fmt: skip
            case = f"along time, {frames} frames{name}"
            yield f"{case}, forward", lambda qkv=qkv, prepared=prepared: kernels.forward(qkv, *prepared)
            yield (
                f"{case}, backward",
                lambda grad=grad, qkv=qkv, prepared=prepared: kernels.backward(grad, qkv, *prepared),
            )


def _caption_attention() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import caption_attention_kernels as kernels

    borders = _empty(2 * B + 1, dtype=torch.int32)
    for keys, ragged in ((32, borders), (64, borders), (120, borders), (120, None), (300, borders)):
        q, kv, sums = _empty(B, T * S, H, P), _empty(B, keys, 2, H, P), _floats(B, H, T * S)
        case = f"captions, {keys} keys{'' if ragged is None else ', ragged'}"
        yield f"{case}, forward", lambda q=q, kv=kv, ragged=ragged: kernels.forward(q, kv, ragged)
        yield (
            f"{case}, backward",
            lambda q=q, kv=kv, ragged=ragged, sums=sums: kernels.backward(q, q, kv, ragged, q, sums),
        )


def _modulation() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import modulation_kernels as kernels
    from train.ops.float8 import empty_rows

    x, statistics = _empty(B, T, S, D), _floats(2 * N)
    for groups in (1, T):
        shift, scale, gate = _empty(B, groups, 3, D).unbind(2)
        norm, no_norm, nothing = (shift, scale), (None, None), None
        for name, h, g, n in (
            ("norm", nothing, nothing, norm), ("gate", x, gate, no_norm), ("gate and norm", x, gate, norm),
            ("sum and norm", x, nothing, norm),
        ):  # fmt: skip
            case = f"{name}, {groups} {'group' if groups == 1 else 'groups'}"
            for rows, bits in ((None, ""), (empty_rows(x, N, D), ", 8 bits")):
                yield f"{case}{bits}, forward", lambda h=h, g=g, n=n, rows=rows: kernels.forward(x, h, g, *n, rows)
            out_grad, read = (None, None) if n[0] is None else (x, x)
            for incoming, branch, twice in ((x, None, ""), (x, x, ", read twice")):
                incoming = None if h is None else incoming
                if incoming is None and branch is not None:
                    continue
                yield (
                    f"{case}{twice}, backward",
                    lambda i=incoming, b=branch, o=out_grad, r=read, g=g, s=n[1]: kernels.backward(
                        i, b, o, r, None if r is None else statistics, None if g is None else x, g, s
                    ),
                )


def _parcels() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import modulation_kernels as kernels
    from train.ops.parcels import parcelled_shape

    x, statistics = _empty(B, T, S, D), _floats(2 * N)
    shape = parcelled_shape(x.shape, 4)
    moved = _empty(*shape)
    shift, scale, gate = _empty(B, 1, 3, D).unbind(2)
    for name, h, g in (("norm", None, None), ("gate and norm", x, gate)):
        yield f"{name}, to parcels, forward", lambda h=h, g=g: kernels.forward(x, h, g, shift, scale, None, 4)
        yield (
            f"{name}, to parcels, backward",
            lambda h=h, g=g: kernels.backward(
                None if h is None else x, None, moved, x, statistics, h, g, scale, x.shape
            ),
        )
    yield "gate, to parcels, forward", lambda: kernels.forward(x, x, gate, None, None, None, 4)
    for name, own in (("h from parcels", x), ("from parcels", moved)):
        yield f"gate, {name}, forward", lambda own=own: kernels.forward(own, moved, gate, None, None)
        yield (
            f"gate, {name}, read twice, backward",
            lambda own=own: kernels.backward(x, x, None, None, None, moved, gate, None, own.shape),
        )
    yield (
        "gate, to parcels, read twice, backward",
        lambda: kernels.backward(moved, moved, None, None, None, x, gate, None, x.shape),
    )


def _norms_and_linear() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import column_sums_kernels, float8_kernels, gelu_kernels, qk_norm_kernels

    qkv, weight = _empty(N, 3, H, P), _empty(P)
    yield "qk-norm, forward", lambda: qk_norm_kernels.forward(qkv, weight, weight)
    packed, apart = qkv.unbind(1), _empty(N, H, P)
    yield "qk-norm, backward", lambda: qk_norm_kernels.backward(apart, apart, apart, qkv, weight, weight)
    yield "qk-norm, backward, packed", lambda: qk_norm_kernels.backward(*packed, qkv, weight, weight)
    x, bias = _empty(N, 4 * D), _empty(4 * D)
    yield "GELU, forward", lambda: gelu_kernels.forward(x, bias)
    yield "GELU, backward", lambda: gelu_kernels.backward(x, x, bias)
    yield "GELU, 8 bits, forward", lambda: float8_kernels.bias_gelu_rows(x, bias)
    yield "GELU, 8 bits, backward", lambda: float8_kernels.bias_gelu_backward_rows(x, x, bias)
    for width in (D, 2 * D, 3 * D, 4 * D):
        rows = _empty(N, width)
        yield f"sums, {width} wide", lambda rows=rows: column_sums_kernels.column_sums(rows)
        yield f"8 bits, {width} wide", lambda rows=rows: float8_kernels.to_rows(rows)
        yield f"8 bits and sums, {width} wide", lambda rows=rows: float8_kernels.to_rows_and_sums(rows)
        weights = _empty(D, width)
        yield f"8 bits, columns of {width}", lambda w=weights: float8_kernels.transposed_to_rows(w)


def _adamw() -> Iterator[tuple[str, Callable[[], Any]]]:
    from train.ops import adamw_kernels
    from train.ops.adamw import AdamWSettings

    size = 2**20 + 3
    masters, halves, settings = (
        _floats(size),
        _empty(size),
        AdamWSettings(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    )
    for average, name in ((None, ""), (masters, ", average")):
        yield (
            f"AdamW{name}",
            lambda average=average: adamw_kernels.step(
                halves, masters, masters, masters, halves, _floats(4), settings, average, 1e-4
            ),
        )


def _encoders() -> Iterator[tuple[str, Callable[[], Any]]]:
    from shared.encoders import fast_vae_kernels, gated_product_kernels, t5_kernels

    tokens, width, inner, heads, head_width, reach = 4099, 4096, 10240, 64, 64, 120
    hidden = _empty(tokens, width)
    yield "T5, norm", lambda: t5_kernels.rms_norm(hidden, _empty(width), 1e-6)
    gated = gated_product_kernels.GatedWeights([_empty(2 * inner, width)], programs=132)
    yield "T5, product with GELU", lambda: gated.of_pass(tokens)(0, hidden, _empty(width), 1e-6)
    yield "T5, GELU", lambda: t5_kernels.gated_gelu(_empty(tokens, 2 * inner))
    whole, tiles = _empty(tokens, dtype=torch.int32), _empty(67, dtype=torch.int32)
    bias = t5_kernels.bias_in_vectors(_floats(heads, 2 * reach - 1), torch.bfloat16)
    yield (
        "T5, attention",
        lambda: t5_kernels.attention(_empty(tokens, 3, heads, head_width), whole, whole, tiles, bias, reach),
    )
    pixels, first = _empty(4, 3, 512, 512), _empty(128, 3, 3, 3)
    yield "VAE, first convolution", lambda: fast_vae_kernels.first_convolution(pixels, first)
    for channels, side in ((128, 512), (256, 256), (512, 64)):
        x = torch.empty(
            4, channels, side, side, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
        )  # fmt: skip
        norm = torch.nn.GroupNorm(32, channels, eps=1e-6, dtype=torch.bfloat16, device="meta")
        partial, bias, case = _floats(4, 256, 2, channels), _floats(channels), f"VAE, {channels} channels"
        yield f"{case}, statistics", lambda x=x: fast_vae_kernels.statistics(x)
        yield f"{case}, add", lambda x=x, bias=bias: fast_vae_kernels.add(x, x, bias)
        yield f"{case}, add, padded", lambda x=x, bias=bias: fast_vae_kernels.add_padded(x, x, bias)
        for silu in (False, True):
            yield (
                f"{case}, norm{' and SiLU' if silu else ''}",
                lambda x=x, partial=partial, bias=bias, norm=norm, silu=silu: fast_vae_kernels.normalise(
                    x, partial, bias if silu else None, norm, silu=silu
                ),
            )
    yield "VAE, softmax", lambda: fast_vae_kernels.softmax(_floats(4, 4096, 4096), 0.04, torch.bfloat16)


def compiled_kernels(*wanted: str) -> Iterator[Compiled]:
    """Compiles the kernels of the wanted cases (none: of all), each once. From then on nothing can be launched."""
    current: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
        current.append(run(kernel, *arguments, **(options | {"warmup": True})))

    driver.set_active(_NoDevice())
    JITFunction.run = compile_only
    seen: set[str] = set()
    for cases in (_time_attention, _caption_attention, _modulation, _parcels, _norms_and_linear, _adamw, _encoders):
        for case, launch in cases():
            if wanted and case not in wanted:
                continue
            current.clear()
            launch()
            for kernel in current:
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    yield _compiled(case, kernel)


if __name__ == "__main__":
    print(f"Triton {triton.__version__}: registers, bytes spilled, bytes shared, programs resident, instructions")
    for found in compiled_kernels(*sys.argv[1:]):
        print(
            f"{found.case:46} {found.kernel:20} {found.warps:2} warps {found.registers:4} {found.spilled:4} "
            f"{found.shared:7,} {found.resident:3} {found.instructions:6}",
            flush=True,
        )
