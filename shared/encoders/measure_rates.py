"""Measures how fast encoders run on this machine: ``python -m shared.encoders.measure_rates --output rates.json``.

Weights are random and of real size (speed does not depend on their values), so nothing is downloaded. What comes out
is kept in ``docs/benchmarks`` and named as a source in ``shared.costs``.
"""

import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import diffusers
import torch
import transformers
import tyro
from transformers import T5Config, T5EncoderModel

from shared.encoders.architectures import ARCHITECTURES
from shared.errors import run_entry_point

T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "d_kv": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """Encode rates of autoencoders and of T5-XXL, with random weights of real size in bfloat16."""

    output: Path
    """A JSON file; written again after every measurement."""
    seconds: float = 300.0
    """No measurement is begun later than this."""
    device: str = "cuda"
    """Where the models run."""
    tiny: bool = False
    """Small pictures and a small T5 in float32: to see that everything runs, not to measure."""
    debug: bool = False
    """Show tracebacks of user errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One measurement."""

    model: str
    """Of ``ARCHITECTURES``, or ``t5-xxl``."""
    mode: Literal["eager", "compiled"] = "eager"
    frames: int = 16
    """Frames a clip, or captions a batch."""
    size: int = 512
    """Pixels along each side, or tokens a caption."""


CASES = (
    Case(model="sd", size=512),
    Case(model="sd", size=256, frames=64),
    Case(model="t5-xxl", frames=64, size=120),
    Case(model="wan2.1", frames=17),
    Case(model="hunyuanvideo", frames=17),
    Case(model="cogvideox", frames=17),
    Case(model="ltx", frames=17),
    Case(model="dc-ae-f32c32"),
    Case(model="dc-ae-f64c128"),
    Case(model="sd", size=512, mode="compiled"),
    Case(model="t5-xxl", frames=64, size=120, mode="compiled"),
    Case(model="sd", size=256, frames=64, mode="compiled"),
    Case(model="dc-ae-f32c32", mode="compiled"),
    Case(model="hunyuanvideo", frames=17, mode="compiled"),
    Case(model="ltx", frames=17, mode="compiled"),
)
"""The most wanted first. SDXL's autoencoder is SD's with other weights, so it has no case of its own."""


def _autoencoder(case: Case, device: str) -> Callable[[], Any]:
    """Returns a function that encodes one batch of random pixels."""
    architecture = ARCHITECTURES[case.model]
    model = getattr(diffusers, architecture.class_name)(**architecture.config).eval().requires_grad_(False)
    model.decoder = None
    model.to(device)
    pixels = torch.rand(case.frames, 3, case.size, case.size, device=device) * 2 - 1
    if architecture.video:
        pixels = pixels.transpose(0, 1)[None]
    elif case.mode == "compiled":
        model.to(memory_format=torch.channels_last)
        pixels = pixels.to(memory_format=torch.channels_last)
    if case.mode == "compiled":
        model.encoder.compile()
    return lambda: model.encode(pixels)


def _t5(case: Case, device: str, *, tiny: bool) -> Callable[[], Any]:
    config = T5Config(
        **{**T5_XXL, **({"num_layers": 2, "d_ff": 512, "d_model": 256, "vocab_size": 32000} if tiny else {})}
    )
    model = T5EncoderModel(config).eval().requires_grad_(False).to(device)
    tokens = torch.randint(2, 32000, (case.frames, case.size), device=device)
    if case.mode == "compiled":
        model.compile()
    return lambda: model(input_ids=tokens)


def _seconds(step: Callable[[], Any], *, cuda: bool, budget: float) -> list[float]:
    """Returns the times of one call each: after two calls for warm-up, as many as the budget takes, 3 to 20."""

    def timed() -> float:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    once = timed()
    return [timed() for _ in range(min(20, max(3, math.floor(budget / once))))]


@torch.inference_mode()
def measure(case: Case, *, device: str, tiny: bool) -> dict[str, Any]:
    """Returns what one case gives: its settings, seconds a call, and units a second (pixels or tokens)."""
    if tiny:
        size = 8 if case.model == "t5-xxl" else 64
        case = Case(
            model=case.model, mode=case.mode, frames=min(case.frames, 17 if case.frames == 17 else 2), size=size
        )
    is_text = case.model == "t5-xxl"
    with torch.device(device):
        step = _t5(case, device, tiny=tiny) if is_text else _autoencoder(case, device)
    times = _seconds(step, cuda=device == "cuda", budget=2.0)
    units = case.frames * case.size if is_text else case.frames * case.size**2
    unit = "tokens_per_second" if is_text else "pixels_per_second"
    return {
        **asdict(case),
        "seconds": median(times),
        "spread": (max(times) - min(times)) / median(times),
        unit: units / median(times),
    }


def main() -> int:
    """Measures every case for which there is time, and writes what comes out."""
    config = tyro.cli(MeasureConfig, prog="python -m shared.encoders.measure_rates")
    begin = time.perf_counter()
    precision = torch.float32 if config.tiny else torch.bfloat16
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else platform.processor() or "cpu",
        "precision": str(precision).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "cases": [],
        "skipped": [],
    }
    torch.set_default_dtype(precision)
    for case in CASES:
        if time.perf_counter() - begin > config.seconds:
            report["skipped"].append({**asdict(case), "reason": "no time left"})
            continue
        try:
            result = measure(case, device=config.device, tiny=config.tiny)
        except (RuntimeError, TypeError, ValueError) as error:
            report["skipped"].append({**asdict(case), "reason": str(error)[:300]})
        else:
            report["cases"].append(result)
        print(f"{time.perf_counter() - begin:6.1f} s  {case.model} {case.mode} {case.frames}x{case.size}", flush=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n")
        torch._dynamo.reset()
        gc.collect()
        if config.device == "cuda":
            torch.cuda.empty_cache()
    config.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
