"""Measures our forward passes against plain transformers and diffusers: ``python -m shared.encoders.benchmark``.

All ways run in one process on the same random weights of real size, so that their ratios hold; each is compared with
float32 too. Results are kept in ``docs/benchmarks`` and told in ``docs/encoder_speed.md``.
"""

import copy
import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import tyro
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from shared.encoders.architectures import ARCHITECTURES
from shared.encoders.fast_t5 import FastT5, pack
from shared.encoders.fast_vae import make_fast
from shared.encoders.measure_rates import T5_XXL
from shared.encoders.t5 import BATCH_TOKENS, TextEncoder
from shared.encoders.t5_products import LEAST_TOKENS
from shared.errors import InputError, run_entry_point

MAX_TOKENS = 120

WAYS = {
    "t5-xxl": ("transformers", "transformers, compiled", "ours", "ours, GELU apart", "ours, PyTorch's products"),
    "sd": ("diffusers", "ours", "diffusers, compiled, channels last"),
}
"""Ways of computing, by model: those compiled on a GPU alone; T5's with the GELU apart, and with PyTorch's products,
where ours does otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Speed and error of T5-XXL and of Stable Diffusion's autoencoder, with random weights of real size."""

    output: Path
    """A JSON file; written again after every measurement."""
    models: tuple[str, ...] = ("t5-xxl", "sd")
    """Which."""
    ways: tuple[str, ...] = ()
    """Which ways of computing, by their names in the table; all if none is named."""
    seconds: float = 2.0
    """Each measurement takes about this long."""
    device: str = "cuda"
    """Where the models run: in bfloat16 on ``cuda``, in float32 on ``cpu``."""
    tiny: bool = False
    """Small models, to see that everything runs, not to measure."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        known = [way for model in self.models for way in WAYS.get(model, ())]
        if unknown := [way for way in self.ways if way not in known]:
            raise InputError(f"--ways {unknown[0]!r}: expected some of {', '.join(map(repr, known))}")

    def wants(self, way: str) -> bool:
        """Whether a way is to be measured."""
        return not self.ways or way in self.ways


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One way of computing one batch."""

    model: str
    way: str
    batch: str
    """What a call computes."""
    unit: str
    """``tokens``, without padding, or ``frames``."""
    seconds: float
    """Median of a call."""
    spread: float
    """Slowest less fastest call, over the median."""
    rate: float
    """Units a second."""
    error: float | None = None
    """Root mean square of the difference from float32, over the deviation of what float32 gives."""
    largest_error: float | None = None
    """Largest difference from float32, over the same."""
    least_cosine: float | None = None
    """Of a token's embedding with what float32 gives."""


def _timed(step: Callable[[], Any], config: BenchmarkConfig) -> list[float]:
    """Returns the seconds of one call each, after three for warm-up."""

    def once() -> float:
        start = time.perf_counter()
        step()
        if config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = [once() for _ in range(3)][-1]
    return [once() for _ in range(min(50, max(3, math.floor(config.seconds / first))))]


def _result(
    config: BenchmarkConfig, step: Callable[[], Any], *, model: str, way: str, batch: str, unit: str, count: int
) -> Result:
    times = _timed(step, config)
    middle = median(times)
    return Result(
        model=model,
        way=way,
        batch=batch,
        unit=unit,
        seconds=middle,
        spread=(max(times) - min(times)) / middle,
        rate=count / middle,
    )


def _errors(result: Result, found: Tensor, expected: Tensor, *, cosine: bool = False) -> Result:
    """Returns a result with the errors of what its way gives."""
    count = min(len(found), len(expected))
    found, expected = found[:count], expected[:count]
    difference, deviation = found.float() - expected, expected.std()
    return replace(
        result,
        error=float(difference.square().mean().sqrt() / deviation),
        largest_error=float(difference.abs().max() / deviation),
        least_cosine=float(torch.cosine_similarity(found.float(), expected, dim=-1).min()) if cosine else None,
    )


def draw_lengths(count: int) -> list[int]:
    """Returns token counts as captions have them: 60 on average, 120 at most."""
    return np.random.default_rng(0).normal(60, 25, count).round().clip(5, MAX_TOKENS).astype(int).tolist()


def measure_t5(config: BenchmarkConfig) -> Iterator[Result]:
    """Yields what T5 gives: captions of 120 tokens in batches of several sizes, and captions of all lengths."""
    cuda, precision = config.device == "cuda", torch.bfloat16 if config.device == "cuda" else torch.float32
    size = {"num_layers": 2, "d_ff": 512, "d_model": 256, "num_heads": 4} if config.tiny else {}
    torch.manual_seed(0)
    with torch.device(config.device):
        model = T5EncoderModel(T5Config(**{**T5_XXL, **size})).eval().requires_grad_(False).to(precision)
    draw = np.random.default_rng(1)
    captions = 2 if config.tiny else 64
    full = [draw.integers(2, 32_000, MAX_TOKENS).tolist() for _ in range(4 * captions)]
    short = sorted((draw.integers(2, 32_000, length).tolist() for length in draw_lengths(16 * captions)), key=len)
    ids = torch.tensor(full[:captions], device=config.device)
    reference = copy.deepcopy(model).float()
    expected = reference(input_ids=ids[:8]).last_hidden_state
    del reference
    named = {"model": "t5-xxl", "unit": "tokens"}
    batch = f"{captions} x {MAX_TOKENS}"

    mixed = f"{len(short)} captions of {sum(map(len, short)) / len(short):.0f} tokens on average"
    count = sum(map(len, short))
    if config.wants("transformers"):
        step = partial(model, input_ids=ids)
        result = _result(config, step, way="transformers", batch=batch, count=ids.numel(), **named)
        yield _errors(result, model(input_ids=ids[:8]).last_hidden_state, expected, cosine=True)
        shuffled = [short[place] for place in draw.permutation(len(short))]
        yield _result(
            config,
            lambda: [_padded(model, shuffled[at : at + captions]) for at in range(0, len(short), captions)],
            way="transformers",
            batch=f"{mixed}, padded by {captions}",
            count=count,
            **named,
        )
    if cuda and config.wants("transformers, compiled"):
        compiled = torch.compile(model, dynamic=False)
        step = partial(compiled, input_ids=ids)
        result = _result(config, step, way="transformers, compiled", batch=batch, count=ids.numel(), **named)
        yield _errors(result, compiled(input_ids=ids).last_hidden_state[:8], expected, cosine=True)
        torch._dynamo.reset()
    ours = {"ours": FastT5(model, max_tokens=MAX_TOKENS)}
    if ours["ours"].fuses_gelu:
        ours["ours, GELU apart"] = FastT5(model, max_tokens=MAX_TOKENS, fuse_gelu=False)
    elif "ours, GELU apart" in config.ways:
        raise InputError("--ways 'ours, GELU apart': here it is never fused: leave this way out")
    if ours["ours"].chooses_products:
        ours["ours, PyTorch's products"] = FastT5(model, max_tokens=MAX_TOKENS, choose_products=False)
    elif "ours, PyTorch's products" in config.ways:
        raise InputError('--ways "ours, PyTorch\'s products": here there are no others: leave this way out')
    for number in (captions // 2, captions, 2 * captions, 4 * captions):
        packed = pack(full[:number], model.device)
        batch = f"{number} x {MAX_TOKENS}"
        for way, fast in ours.items():
            same = way == "ours, PyTorch's products" and number * MAX_TOKENS < LEAST_TOKENS
            if config.wants(way) and not same:
                result = _result(config, partial(fast, packed), way=way, batch=batch, count=len(packed.ids), **named)
                yield _errors(result, fast(packed).view(number, MAX_TOKENS, -1)[:8], expected, cosine=True)
    if config.wants("ours"):
        encoder = TextEncoder(model, None, name="t5-xxl", weights="", max_tokens=MAX_TOKENS, cleaning="none")
        batch = f"{mixed}, in batches of {BATCH_TOKENS[config.device]} tokens"
        yield _result(config, lambda: encoder.embed(short), way="ours", batch=batch, count=count, **named)


def _padded(model: T5EncoderModel, captions: Sequence[list[int]]) -> Tensor:
    """Returns the embeddings (N, L, D) of captions padded to the longest, as pipelines compute them."""
    longest = max(map(len, captions))
    ids = torch.tensor([caption + [0] * (longest - len(caption)) for caption in captions], device=model.device)
    mask = torch.tensor([[1] * len(caption) + [0] * (longest - len(caption)) for caption in captions])
    return model(input_ids=ids, attention_mask=mask.to(model.device)).last_hidden_state


def measure_vae(config: BenchmarkConfig) -> Iterator[Result]:
    """Yields what Stable Diffusion's encoder gives: frames of 512x512 in batches of several sizes, and of 256x256."""
    cuda, precision = config.device == "cuda", torch.bfloat16 if config.device == "cuda" else torch.float32
    torch.manual_seed(0)
    small = {"block_out_channels": (32, 32, 64, 64)} if config.tiny else {}
    with torch.device(config.device):
        vae = AutoencoderKL(**{**ARCHITECTURES["sd"].config, **small}).eval().requires_grad_(False).to(precision)
    sides, frames = ((32, 64), 2) if config.tiny else ((256, 512), 16)
    pixels = {
        side: torch.rand(4 * frames, 3, side, side, device=config.device, dtype=precision) * 2 - 1 for side in sides
    }
    reference = copy.deepcopy(vae).float()
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = torch.cat(
            [reference.encode(part[None].float()).latent_dist.mean for part in pixels[sides[1]][:frames]]
        )
    del reference
    named = {"model": "sd", "unit": "frames"}
    cases = [(frames, sides[1]), (4 * frames, sides[0])]

    def plain(x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mean

    for count, side in cases if config.wants("diffusers") else ():
        x, batch = pixels[side][:count], f"{count} of {side}x{side}"
        result = _result(config, partial(plain, x), way="diffusers", batch=batch, count=count, **named)
        yield _errors(result, plain(x), expected) if side == sides[1] else result
    fast = make_fast(vae)
    ours = [(frames // 2, sides[1]), *cases, (2 * frames, sides[1]), (4 * frames, sides[1])]
    for count, side in ours if config.wants("ours") else ():
        x, batch = pixels[side][:count], f"{count} of {side}x{side}"
        result = _result(config, partial(fast, x), way="ours", batch=batch, count=count, **named)
        same = side == sides[1] and count >= frames
        yield _errors(result, fast(x)[:frames].chunk(2, dim=1)[0], expected) if same else result
    if cuda and config.wants("diffusers, compiled, channels last"):
        vae.to(memory_format=torch.channels_last)
        vae.encoder = torch.compile(vae.encoder, dynamic=False)
        x = pixels[sides[1]][:frames].to(memory_format=torch.channels_last)
        batch, way = f"{frames} of {sides[1]}x{sides[1]}", "diffusers, compiled, channels last"
        result = _result(config, lambda: plain(x), way=way, batch=batch, count=frames, **named)
        yield _errors(result, plain(x), expected)
        torch._dynamo.reset()


MEASURES: dict[str, Callable[[BenchmarkConfig], Iterator[Result]]] = {"t5-xxl": measure_t5, "sd": measure_vae}


def table(results: Sequence[Result]) -> str:
    """Returns a Markdown table; ratios are to the first result of the model."""
    lines = [
        "| model | way | batch | rate | times the first | error | largest | least cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    firsts: dict[str, Result] = {}
    for result in results:
        first = firsts.setdefault(result.model, result)
        figures = [
            "" if value is None else form.format(value)
            for value, form in (
                (result.error, "{:.4f}"),
                (result.largest_error, "{:.3f}"),
                (result.least_cosine, "{:.6f}"),
            )
        ]
        rate = f"{result.rate:,.0f} {result.unit}/s"
        cells = [result.model, result.way, result.batch, rate, f"{result.rate / first.rate:.2f}", *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> int:
    """Measures every way, writes what comes out and prints it as a table."""
    config = tyro.cli(BenchmarkConfig, prog="python -m shared.encoders.benchmark")
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "results": [],
    }
    results: list[Result] = []
    for name in config.models:
        for result in MEASURES[name](config):
            results.append(result)
            report["results"].append(asdict(result))
            config.output.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{result.model} {result.way} {result.batch}: {result.rate:,.0f} {result.unit}/s", flush=True)
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
