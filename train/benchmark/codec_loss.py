"""``python -m train.benchmark codec_loss``: what a compact cache costs in loss, on your clips.

The same model is trained on the same samples with the same draws: encoded online without rounding, and from caches in
several codecs, which ``python -m preprocess`` makes. Two seeds tell how much of a difference is chance. Then, judged on
sources that are held out: one window of each clip, several, and a fresh one every epoch.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from shared.cache.dataset import Cache
from shared.errors import InputError
from train.benchmark.results import make_room, write_results
from train.chosen_rows import Selection
from train.config import TrainConfig
from train.diffusion.objective import bucket_draws, create_objective
from train.loader import load_batches
from train.loss import batch_loss
from train.model import create_model
from train.parallel.ranks import Ranks, join_ranks
from train.plan import BatchPlan
from train.rank_batches import LoaderJob
from train.run_folder import METRICS_FILE, read_run, require_same_options
from train.sample_index import SampleIndex

_EXACT = ("float32", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecLossBenchmark:
    """Trains a small model from online encoding and from caches in several codecs, and compares the losses."""

    manifest: str
    """The clips, as for python -m preprocess."""
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "latentmill-codec-loss")
    """For caches and runs, which are kept, and used again."""
    output: Path | None = None
    """A JSON file for the results."""
    codecs: tuple[str, ...] = (
        "bfloat16/bfloat16",
        "bfloat16+zstd/bfloat16+zstd",
        "int8@40+delta+zstd/bfloat16+zstd",
        "int8@40+delta+zstd/int8@30+zstd",
        "int8@30+delta+zstd/int8@20+zstd",
    )
    """Of latents and of texts, each LATENTS/TEXTS; float32/float32 is always among them."""
    buckets: tuple[str, ...] = ("8x64x64",)
    """Sizes to encode."""
    frame_interval: int = 2
    """Take every N-th source frame."""
    windows: int = 4
    """Windows of a clip."""
    vae: str = "demo:vae"
    """The autoencoder."""
    text_encoder: str = "demo:t5"
    """T5."""
    model: str = "stdit-ti/2"
    """The model that is trained."""
    model_settings: tuple[str, ...] = ("depth=2", "hidden_size=64", "num_heads=4")
    """Settings of it that differ from the preset."""
    steps: int = 200
    """Of each run."""
    batch_size: int = 4
    """Samples of a step."""
    lr: float = 1e-3
    """Learning rate."""
    holdout: str = "25%"
    """Of the sources, for the comparison of windows."""
    levels: int = 8
    """Noise levels at which held-out samples are judged."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for pair in self.codecs:
            if pair.count("/") != 1:
                raise InputError(f"codecs {pair}: expected LATENTS/TEXTS, e.g. int8@40+delta+zstd/int8@30+zstd")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecRow:
    """How the losses of a run differ from those of online encoding without rounding."""

    source: str
    cache_bytes: int | None
    mean_loss: float
    mean_difference: float
    """Mean over the steps of the magnitude of the difference."""
    relative: float
    """Of the mean loss."""
    final_difference: float
    """Mean loss of the last tenth of the steps, less that of the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRow:
    """A run with some of the sources held out."""

    windows: str
    training_loss: float
    """Of the last tenth of the steps."""
    held_out_loss: float
    """Over all windows of the sources that are held out, at fixed noise levels."""


def main(arguments: Sequence[str]) -> int:
    """Trains, prints the tables, writes the results and returns the exit code."""
    config = tyro.cli(CodecLossBenchmark, prog="python -m train.benchmark codec_loss", args=arguments)
    make_room(config.output)
    with join_ranks() as ranks:
        if ranks.world_size > 1:  # each would make the caches
            raise InputError(f"codec_loss compares runs of one device, found {ranks.world_size} ranks: run it alone")
        codecs, windows = _compare_codecs(config, ranks), _compare_windows(config, ranks)
    print(codec_table(codecs))
    print(window_table(windows))
    if config.output is not None:
        results = {
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "torch": torch.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "codecs": [asdict(row) for row in codecs],
            "windows": [asdict(row) for row in windows],
        }
        write_results(config.output, results)
    return 0


def _compare_codecs(config: CodecLossBenchmark, ranks: Ranks) -> list[CodecRow]:
    online = _losses(config, ranks, "online", **_online(config))
    rows = [compare("online, nothing rounded", online, online, None)]
    for pair in ("/".join(_EXACT), *config.codecs):
        cache = _cache(config, pair)
        num_bytes = sum(file.stat().st_size for file in (cache / "shards").rglob("*") if file.is_file())
        losses = _losses(config, ranks, f"cache-{_name(pair)}", cache=str(cache))
        rows.append(compare(f"cache {pair}", losses, online, num_bytes))
    other = _losses(config, ranks, "online-seed-1", seed=1, **_online(config))
    return [*rows, compare("online, another seed", other, online, None)]


def _compare_windows(config: CodecLossBenchmark, ranks: Ranks) -> list[WindowRow]:
    cache = str(_cache(config, "/".join(_EXACT)))
    random = _online(config) | {"windows_per_clip": 1, "online_windows": "random"}
    runs: dict[str, dict[str, Any]] = {
        "one, from a cache": {"cache": cache, "where": "window is None"},
        f"up to {config.windows}, from a cache": {"cache": cache},
        "random, online": random,
    }
    rows = []
    for number, (name, options) in enumerate(runs.items()):
        folder = f"windows-{number}"
        losses = _losses(config, ranks, folder, holdout=config.holdout, **options)
        held_out = _held_out_loss(config, config.folder / folder, cache)
        rows.append(WindowRow(windows=name, training_loss=_final(losses), held_out_loss=held_out))
    return rows


def compare(source: str, losses: Sequence[float], reference: Sequence[float], cache_bytes: int | None) -> CodecRow:
    """Returns how the losses of a run's steps differ from those of another run on the same samples."""
    differences = [abs(ours - theirs) for ours, theirs in zip(losses, reference, strict=True)]
    return CodecRow(
        source=source,
        cache_bytes=cache_bytes,
        mean_loss=statistics.mean(losses),
        mean_difference=statistics.mean(differences),
        relative=statistics.mean(differences) / statistics.mean(reference),
        final_difference=_final(losses) - _final(reference),
    )


def _final(losses: Sequence[float]) -> float:
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def _online(config: CodecLossBenchmark) -> dict[str, Any]:
    return {
        "online": config.manifest,
        "buckets": config.buckets,
        "frame_interval": config.frame_interval,
        "windows_per_clip": config.windows,
        "vae": config.vae,
        "text_encoder": config.text_encoder,
        "latent_codec": _EXACT[0],
        "text_codec": _EXACT[1],
        "probes": str(config.folder / "probes"),
        "on_corrupt": "skip",
    }


def _name(pair: str) -> str:
    return pair.replace("/", "_")


def _cache(config: CodecLossBenchmark, pair: str) -> Path:
    """Returns the cache of a pair of codecs; made if it is not there."""
    folder = config.folder / "caches" / _name(pair)
    if (folder / "index").is_dir():
        return folder
    latents, texts = pair.split("/")
    models = ["--vae", config.vae, "--text-encoder", config.text_encoder]
    if config.vae.startswith("demo:"):
        models = ["--preset", "demo"]
    command = [
        *(sys.executable, "-m", "preprocess", "--manifest", config.manifest, "--output", str(folder)),
        *("--buckets", *config.buckets, "--frame-interval", str(config.frame_interval)),
        *("--windows-per-clip", str(config.windows), "--probes", str(config.folder / "probes")),
        *("--latent-codec", latents, "--text-codec", texts, *models),
    ]
    if subprocess.run(command).returncode != 0:
        raise InputError(f"{' '.join(command)}: failed, see above")
    return folder


def _losses(config: CodecLossBenchmark, ranks: Ranks, name: str, **options: Any) -> list[float]:
    """Returns the loss of each step of a run. One that is complete is not repeated, if it had the same options."""
    from train.trainer import train

    output = config.folder / name
    base = {
        "output": output,
        "model": config.model,
        "model_settings": config.model_settings,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "precision": "float32",
        "ema_decay": None,
        "log_every": 1,
        "checkpoint_every": config.steps,
        "peak_tflops": 1.0,
        "num_workers": 1,
    }
    run = TrainConfig.of(**(base | options))
    require_same_options(output, run.to_json(), exactly=True)
    train(run, ranks)
    rows = map(json.loads, (output / METRICS_FILE).read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@torch.no_grad()
def _held_out_loss(config: CodecLossBenchmark, run: Path, cache: str) -> float:
    """Returns a run's mean loss over the sources that were held out: all their windows, each at the same levels."""
    described = read_run(run)
    model = create_model(config.model, **described.model_config)
    checkpoint = run / "checkpoints" / f"step-{config.steps:08d}" / "model.safetensors"
    model.load_state_dict(load_file(checkpoint))
    model.eval()
    selection = Selection(holdout=config.holdout, held_out_side=True)
    index = SampleIndex.open(Cache.open(cache), selection, variants="all")
    plan = BatchPlan(index.buckets, batch_sizes=dict.fromkeys(index.buckets, 1), seed=0)
    job = LoaderJob.of_index(index, plan, rank=0, world_size=1, seed=0, caption_dropout=0.0)
    objective = create_objective(None, model=config.model, spatial_stride=index.geometry.spatial_stride)
    losses = [
        float(batch_loss(model, objective, batch, wants_size=bool(model.wants_size), u=draw[None]).loss)
        for batch in load_batches(job, range(plan.num_samples), num_workers=0, pin_memory=False)
        for draw in bucket_draws(config.levels)
    ]
    return statistics.mean(losses)


def codec_table(rows: Sequence[CodecRow]) -> str:
    """Returns the comparison of codecs in Markdown."""
    lines = [
        "| source | cache, KB | mean loss | mean difference a step | of the loss | difference at the end |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = "" if row.cache_bytes is None else f"{row.cache_bytes / 1000:,.0f}"
        lines.append(
            f"| {row.source} | {size} | {row.mean_loss:.5f} | {row.mean_difference:.2e} | {100 * row.relative:.4f} % "
            f"| {row.final_difference:+.2e} |"
        )
    return "\n".join(lines)


def window_table(rows: Sequence[WindowRow]) -> str:
    """Returns the comparison of windows in Markdown."""
    lines = ["| windows of a clip | training loss at the end | loss on held-out sources |", "|---|---|---|"]
    lines += [f"| {row.windows} | {row.training_loss:.4f} | {row.held_out_loss:.4f} |" for row in rows]
    return "\n".join(lines)
