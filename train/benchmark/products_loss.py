"""``python -m train.benchmark products_loss``: what products in 8 bits cost in loss, on the samples of a cache.

The same model takes the trainer's own steps from the same initial weights on the same batches: with products in
bfloat16 and in 8 bits. How much of a difference is chance is told by two more runs: in bfloat16 with some kernels left
out, which rounds elsewhere (on a GPU; a CPU has none to leave out), and with another seed, which draws other weights,
another order and other noise.
"""

import dataclasses
import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from shared.errors import InputError
from train.batches import open_batches
from train.benchmark.results import make_room, write_results
from train.building import build_model
from train.config import TrainConfig
from train.config.parallel import Products
from train.ops.reference import Kernel, reference_operations
from train.parallel.ranks import Ranks, join_ranks
from train.parallel.zero import build_engine
from train.schedules import learning_rate
from train.setup import check_run
from train.step import StepResult, TrainingStep

_LEFT_OUT: tuple[Kernel, ...] = ("modulation", "gelu")
_LOGGED_EVERY = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductsLossBenchmark:
    """Trains a model with products in bfloat16 and in 8 bits, and compares the losses."""

    cache: str
    """Whose samples are trained on."""
    output: Path | None = None
    """A JSON file for the results, written anew after each run."""
    model: str = "stdit-xl/2"
    """The model that is trained."""
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Settings of it that differ from the preset. Values are JSON."""
    steps: int = 200
    """Of each run."""
    final_steps: int = 50
    """Of those, how many count for the loss at the end."""
    batch_size: int = 8
    """Samples of a step."""
    lr: float = 1e-4
    """Learning rate, after a tenth of the steps in which it rises."""
    seeds: tuple[int, ...] = (0, 1)
    """Each is trained in both ways; the first with kernels left out, too."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not 1 <= self.final_steps <= self.steps:
            raise InputError(f"final_steps={self.final_steps}: expected 1 to steps={self.steps}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds={' '.join(map(str, self.seeds))}: expected different ones, at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A run that is compared."""

    name: str
    seed: int
    products: Products | None = None
    left_out: tuple[Kernel, ...] = ()
    """Kernels in whose place plain PyTorch runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """How the losses of a run differ from those of another."""

    way: str
    seed: int
    against: str
    """The other run."""
    mean_loss: float
    final_loss: float
    """Mean of the last steps."""
    mean_difference: float
    """Mean over the steps."""
    mean_distance: float
    """Mean over the steps of the difference's magnitude."""
    final_difference: float
    """Of the last steps."""
    losses: list[float] = field(repr=False)
    """Of each step."""


def main(arguments: Sequence[str]) -> int:
    """Trains, prints the table, writes the results and returns the exit code."""
    config = tyro.cli(ProductsLossBenchmark, prog="python -m train.benchmark products_loss", args=arguments)
    make_room(config.output)
    rows: list[LossRow] = []
    losses: dict[Way, list[float]] = {}
    with join_ranks() as ranks:
        if ranks.world_size > 1:
            raise InputError(f"products_loss compares runs of one device, found {ranks.world_size} ranks: run it alone")
        for way, other in compared_ways(config.seeds):
            losses[way] = train_losses(config, ranks, way)
            rows.append(compare(way, losses[way], other, losses[other], final_steps=config.final_steps))
            _write(config, ranks, rows)
    print(loss_table(rows, config.final_steps))
    return 0


def compared_ways(seeds: Sequence[int]) -> list[tuple[Way, Way]]:
    """Returns the runs in their order, each with that which it is compared with, which is itself or before it."""
    first = Way(name="bfloat16", seed=seeds[0])
    pairs = [
        (first, first),
        (dataclasses.replace(first, name="products in float8", products="float8"), first),
        (dataclasses.replace(first, name="bfloat16, rounded elsewhere", left_out=_LEFT_OUT), first),
    ]
    for seed in seeds[1:]:
        other = Way(name="bfloat16, another seed", seed=seed)
        pairs += [(other, first), (Way(name="products in float8", seed=seed, products="float8"), other)]
    return pairs


def train_losses(config: ProductsLossBenchmark, ranks: Ranks, way: Way) -> list[float]:
    """Returns the loss of each step of a run.

    Raises:
        InputError: if a loss or a gradient is no finite number.
    """
    options = TrainConfig.of(
        cache=config.cache,
        output=Path("unused"),
        model=config.model,
        model_settings=config.model_settings,
        batch_size=config.batch_size,
        steps=config.steps,
        lr=config.lr,
        warmup_steps=config.steps // 10,
        ema_decay=None,
        seed=way.seed,
        products=way.products,
    )
    ranks.share_samples(1, zero_stage=2)
    run = check_run(options, ranks)
    torch.manual_seed(way.seed)
    with ranks.device:
        model = build_model(run.model_config, options)
    engine, _ = build_engine(model, options, ranks.device, ranks.world_size)
    step = TrainingStep(engine, model, run.objective)
    results = []
    print(f"{way.name}, seed {way.seed}", flush=True)
    with reference_operations(way.left_out):
        for number, batch in enumerate(open_batches(run, ranks, first_step=0)):
            rate = learning_rate(number, options.optimiser, options.decay_steps)
            results.append(step.take(batch.to(ranks.device), rate))
            if number:  # the verdict on this one is still being computed
                _require_applied(way, number - 1, results[number - 1])
            if (number + 1) % _LOGGED_EVERY == 0:
                print(f"  step {number + 1}: loss {results[-1].terms.loss.mean().item():.4f}", flush=True)
    _require_applied(way, config.steps - 1, results[-1])
    losses: list[float] = torch.stack([result.terms.loss.mean() for result in results]).tolist()
    engine.destroy()
    del engine, model, step, results
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return losses


def _require_applied(way: Way, number: int, result: StepResult) -> None:
    if not result.applied:
        raise InputError(f"{way.name}: step {number} has no finite loss or gradient: use a smaller --lr")


def compare(way: Way, losses: list[float], other: Way, reference: Sequence[float], *, final_steps: int) -> LossRow:
    """Returns how the losses of a run's steps differ from those of another."""
    differences = [ours - theirs for ours, theirs in zip(losses, reference, strict=True)]
    return LossRow(
        way=way.name,
        seed=way.seed,
        against=f"{other.name}, seed {other.seed}",
        mean_loss=statistics.mean(losses),
        final_loss=statistics.mean(losses[-final_steps:]),
        mean_difference=statistics.mean(differences),
        mean_distance=statistics.mean(map(abs, differences)),
        final_difference=statistics.mean(differences[-final_steps:]),
        losses=losses,
    )


def loss_table(rows: Sequence[LossRow], final_steps: int) -> str:
    """Returns the comparison in Markdown."""
    lines = [
        f"| run | seed | mean loss | of the last {final_steps} steps | against | difference, mean | in magnitude | "
        f"of the last {final_steps} steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.way} | {row.seed} | {row.mean_loss:.5f} | {row.final_loss:.5f} | {row.against} "
        f"| {row.mean_difference:+.2e} | {row.mean_distance:.2e} | {row.final_difference:+.2e} |"
        for row in rows
    ]
    return "\n".join(lines)


def _write(config: ProductsLossBenchmark, ranks: Ranks, rows: Sequence[LossRow]) -> None:
    if config.output is None:
        return
    on_gpu = ranks.device.type == "cuda"
    results: dict[str, Any] = {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
        "rows": [asdict(row) for row in rows],
    }
    write_results(config.output, results, loss_table(rows, config.final_steps))
