"""A long video on several GPUs: 256x512x512, 262,144 tokens of STDiT-XL/2, its frames spread over the ranks."""

import json
import math
import time
from pathlib import Path

import torch

from tests.train.distributed.training_cases import objective_of
from train.config import TrainConfig
from train.data import Batch
from train.ema import Ema
from train.model import create_model
from train.parallel.ranks import Ranks
from train.parallel.zero import build_engine
from train.step import TrainingStep

MODEL, STEPS = "stdit-xl/2", 3
SIZE, TOKENS, TEXT_CHANNELS = (256, 64, 64), 120, 4096


def a_video_of_262k_tokens_trains(ranks: Ranks, folder: Path) -> None:
    """Writes ``report.json`` beside the folder: losses, seconds a step, peak memory of each rank."""
    config = TrainConfig.of(
        cache="none",
        output=Path("none"),
        model=MODEL,
        zero_stage=2,
        sequence_parallel=ranks.world_size,
        activation_checkpointing="full",
    )
    ranks.share_samples(ranks.world_size, zero_stage=2)
    torch.manual_seed(0)
    model = create_model(MODEL, activation_checkpointing="full", space_scale=1.0, time_scale=2 / 3)
    model.layout_for = ranks.sequence.layout_for
    engine, masters = build_engine(model, config, ranks.device, ranks.world_size)
    step, ema = TrainingStep(engine, model, objective_of(MODEL)), Ema(masters, 0.9999)
    losses, seconds = [], []
    for number in range(STEPS):
        batch = _batch(number).to(ranks.device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = step.take(batch, 1e-4, ema.following(number))
        losses.append(float(result.terms.loss.mean()))
        seconds.append(time.perf_counter() - start)
        assert result.applied
        assert math.isfinite(losses[-1])
    assert len(set(ranks.gather(tuple(losses)))) == 1, "the ranks of a group see one loss"
    peaks = ranks.gather(torch.cuda.max_memory_allocated(ranks.device))
    if ranks.is_first:
        tokens = SIZE[0] * SIZE[1] * SIZE[2] // 4
        report = {
            "device": torch.cuda.get_device_name(ranks.device),
            "ranks": ranks.world_size,
            "tokens": tokens,
            "losses": losses,
            "seconds_a_step": [round(value, 3) for value in seconds],
            "tokens_per_second_a_gpu": round(tokens / seconds[-1] / ranks.world_size),
            "peak_gib": [round(peak / 2**30, 2) for peak in peaks],
        }
        (folder.parent / "report.json").write_text(json.dumps(report))


def _batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        latents=torch.randn(1, 4, *SIZE, generator=generator).bfloat16(),
        u=torch.rand(1, generator=generator, dtype=torch.float64),
        noise_keys=torch.tensor([step]),
        captions=torch.randn(1, 1, TOKENS, TEXT_CHANNELS, generator=generator).bfloat16(),
        mask=torch.ones(1, TOKENS, dtype=torch.int32),
        drop_caption=torch.tensor([False]),
        fps=torch.tensor([24.0]),
        height=torch.tensor([512.0]),
        width=torch.tensor([512.0]),
        identity=torch.zeros(1, 2, dtype=torch.int64),
    )
