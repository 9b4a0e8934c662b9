"""What encoding costs in GPU time: measured rates, each with its GPU and its source, and the hours they give. Pure."""

from dataclasses import dataclass

_RATES = "docs/benchmarks/encode_rates_h200.json: bfloat16, random weights, torch 2.11, without torch.compile"

MEASURED_GPU = "H200"
"""The GPU on which every rate below was measured."""

PEAK_TFLOPS: dict[str, float] = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bfloat16 products by the vendors' data sheets. Rates of GPUs that were not measured are scaled by these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeRate:
    """How fast one GPU encodes."""

    per_second: float
    """Source pixels (height x width x frames) of an autoencoder, tokens of a text encoder."""
    source: str


VAE_RATES: dict[str, EncodeRate] = {
    "sd": EncodeRate(per_second=4.71e7, source=f"{_RATES}, 16 frames of 512x512 at a time"),
    "sdxl": EncodeRate(per_second=4.71e7, source=f"{_RATES}, as sd: the same architecture"),
    "cogvideox": EncodeRate(per_second=1.72e7, source=f"{_RATES}, clips of 17x512x512"),
    "wan2.1": EncodeRate(per_second=2.77e7, source=f"{_RATES}, clips of 17x512x512"),
    "hunyuanvideo": EncodeRate(per_second=1.39e7, source=f"{_RATES}, clips of 17x512x512"),
    "ltx": EncodeRate(per_second=2.41e8, source=f"{_RATES}, clips of 17x512x512"),
    "dc-ae-f32c32": EncodeRate(per_second=2.87e7, source=f"{_RATES}, 16 frames of 512x512 at a time"),
    "dc-ae-f64c128": EncodeRate(per_second=3.05e7, source=f"{_RATES}, 16 frames of 512x512 at a time"),
}
"""Of the measured GPU, by the names of ``storage_estimates.presets``."""

T5_XXL_RATE = EncodeRate(per_second=3.87e4, source=f"{_RATES}, 64 captions of 120 tokens at a time")
"""Of the measured GPU: the encoder of T5 v1.1-XXL, 4.6 billion parameters."""

T5_XXL_CHANNELS = 4096
"""Width of its embeddings."""
T5_XXL_GPU_BYTES = 9_520_000_000
"""What the encoder's weights take on a GPU: 4.76 billion parameters with embeddings, 2 bytes each."""

TRAINING_UTILISATION = 0.482
"""Share of the peak rate that training reaches: the highest found for a video DiT (H100, arXiv 2503.12964)."""


def gpu_seconds(units: float, rate: EncodeRate, gpu: str = MEASURED_GPU) -> float:
    """Returns the seconds that one GPU takes to encode so many pixels or tokens."""
    return units / (rate.per_second * PEAK_TFLOPS[gpu] / PEAK_TFLOPS[MEASURED_GPU])


def t5_rate(channels: int) -> EncodeRate:
    """Returns the rate of a T5 encoder of another width: as its products shrink, by the square of the width."""
    if channels == T5_XXL_CHANNELS:
        return T5_XXL_RATE
    scale = (T5_XXL_CHANNELS / channels) ** 2
    return EncodeRate(
        per_second=T5_XXL_RATE.per_second * scale, source=f"{T5_XXL_RATE.source}, scaled to {channels} channels"
    )


def stdit_step_seconds(*, frames: int, height: int, width: int, text_tokens: float, gpu: str = MEASURED_GPU) -> float:
    """Returns the seconds of one sample's share of a training step of STDiT-XL/2 on 8x latents of every frame.

    Forward and backward, 3 x the forward products: 1.338 GFLOP a token in linear layers, and attention over space,
    time and caption in 28 blocks of width 1152.
    """
    spatial = (height // 16) * (width // 16)
    per_token = 1.338e9 + 4 * 1152 * 28 * (spatial + frames + text_tokens)
    flop = 3 * per_token * spatial * frames
    return flop / (PEAK_TFLOPS[gpu] * 1e12 * TRAINING_UTILISATION)
