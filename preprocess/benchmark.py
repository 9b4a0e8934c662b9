"""Measures stage 1 on the GPUs at hand, end to end through Ray: ``python -m preprocess.benchmark``.

T5-XXL and SD's autoencoder at their real sizes with random weights (speed does not depend on their values), real clips.
Busy is the time in which the encoders' kernels ran, by events of the GPU, over wall time, after warm-up. The encoders'
own speed is measured in the same run, on the same kind of shards, from frames in memory. Figures are medians where a
thing is repeated.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from preprocess.config import PreprocessConfig
from shared.errors import InputError, run_entry_point
from shared.spec import Bucket

_TEXT = "a slow pan over hills and water while two people walk along the shore under heavy clouds at dusk"
_TAIL_SHARDS = 3
"""A worker, which do not count: towards the end workers run dry one after another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Stage 1 from clips to a cache, against its encoders alone."""

    clips: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER ...")]
    """For each bucket a folder of .mp4 files that go into it, the nearest aspect ratio and the most pixels first; each
    is linked under as many names as there are samples."""
    output: Path
    """A JSON file; a table is printed."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TxHxW ...")] = ("64x512x512", "16x256x256")
    samples: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (576, 5800)
    """Of each bucket, a worker."""
    shard_samples: int = 64
    """Samples a shard."""
    workers: int = 1
    """GPUs to use."""
    warm_up_seconds: float = 5.0
    """After the first shard of a bucket is committed by each worker: not counted."""
    alone_seconds: float = 12.0
    """For the encoders alone, a bucket."""
    models: Path | None = None
    """A folder for the models and the cache; a temporary one by default."""
    decoder: Literal["cpu", "nvdec"] = "cpu"
    """What decodes."""
    tiny: bool = False
    """The demo's models: to see that everything runs, not to measure."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        if not len(self.buckets) == len(self.samples) == len(self.clips):
            raise InputError("--buckets, --samples, --clips: expected as many of each")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one bucket gave."""

    bucket: str
    workers: int
    samples: int
    seconds: float
    """Counted, after warm-up."""
    samples_per_second: float
    frames_per_second: float
    tokens_per_second: float
    """Of the whole job, not of T5's own time."""
    busy: float
    """Part of the counted time in which kernels of the encoders ran, mean over the workers."""
    wait: float
    """Part in which a worker stood still for frames."""
    alone_samples_per_second: float
    """Of the encoders of one worker, from frames in memory."""
    alone_frames_per_second: float
    """Of the autoencoder by itself."""
    alone_tokens_per_second: float
    """Of T5 by itself, tokens of captions."""

    @property
    def of_alone(self) -> float:
        """End to end, as a part of what the encoders of all workers reach alone."""
        return self.samples_per_second / (self.alone_samples_per_second * self.workers)


def measure(config: BenchmarkConfig, folder: Path) -> list[Row]:
    """Returns a row a bucket."""
    text_encoder, vae = _models(config, folder)
    job = PreprocessConfig(
        manifest=str(_manifest(config, folder / "clips")),
        output=str(folder / "cache"),
        buckets=config.buckets,
        preset="demo" if config.tiny else None,
        vae=None if config.tiny else vae,
        text_encoder=None if config.tiny else text_encoder,
        shard_samples=config.shard_samples,
        workers=config.workers,
        decoder=config.decoder,
    )
    run = _run(job)
    alone = _alone(job, config)
    rows = []
    for text in config.buckets:
        bucket, rates = Bucket.parse(text), alone[text]
        begun, ended, counted = _counted(run, text, config, is_last=text == config.buckets[-1])
        busy, wait = _busy(run, begun, ended)
        seconds = ended - begun
        rows.append(
            Row(
                bucket=text,
                workers=config.workers,
                samples=counted,
                seconds=seconds,
                samples_per_second=counted / seconds,
                frames_per_second=counted * bucket.num_frames / seconds,
                tokens_per_second=counted * rates["tokens_a_sample"] / seconds,
                busy=busy,
                wait=wait,
                alone_samples_per_second=rates["samples_per_second"],
                alone_frames_per_second=rates["frames_per_second"],
                alone_tokens_per_second=rates["tokens_per_second"],
            )
        )
    _write(config, rows)
    return rows


def _models(config: BenchmarkConfig, folder: Path) -> tuple[str, str]:
    """Makes the models, if they are not there, and returns their folders."""
    text_encoder, vae = folder / "t5", folder / "vae"
    if not config.tiny and not (vae / "config.json").exists():
        from shared.encoders.full_size import write_sd_vae, write_t5_xxl

        write_t5_xxl(text_encoder)
        write_sd_vae(vae)
    return str(text_encoder), str(vae)


def _manifest(config: BenchmarkConfig, folder: Path) -> Path:
    """Links the clips under many names, each with a caption of its own that fills the token limit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vocabulary, lines = _TEXT.split(), ["path,text"]
    for text, clips, samples in zip(config.buckets, config.clips, config.samples, strict=True):
        originals = sorted(clips.glob("*.mp4"))
        if not originals:
            raise InputError(f"--clips {clips}: found no .mp4 in it")
        for number in range(samples * config.workers):
            original = originals[number % len(originals)]
            name = f"{text}-{number:07}.mp4"
            try:
                os.link(original, folder / name)
            except OSError:
                os.symlink(original.absolute(), folder / name)
            words = [vocabulary[(number * 7 + place * (1 + number % 5)) % len(vocabulary)] for place in range(160)]
            lines.append(f"{name},clip {number} of {' '.join(words)}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


def _run(job: PreprocessConfig) -> Path:
    """Runs stage 1 and returns the folder of the run."""
    from preprocess.job.driver import run_job

    report = run_job(job)
    print(report.table(), flush=True)
    assert report.run_url is not None
    return Path(report.run_url)


def _counted(run: Path, bucket: str, config: BenchmarkConfig, *, is_last: bool) -> tuple[float, float, int]:
    """Returns from when to when samples of a bucket count, in seconds since the epoch, and how many were committed."""
    lines = [json.loads(line) for part in sorted(run.glob("events-*.jsonl")) for line in part.read_text().splitlines()]
    commits = [
        (datetime.fromisoformat(line["time"]).timestamp(), line["num_members"], line["worker"])
        for line in lines
        if line["event"] == "committed" and line["shard"].startswith(f"shards/{bucket}/")
    ]
    first: dict[str, float] = {}
    for when, _, worker in commits:
        first.setdefault(worker, when)
    warm = max(first.values(), default=0.0) + config.warm_up_seconds
    during = [commit for commit in commits if commit[0] >= warm]
    if is_last:
        during = during[: len(during) - _TAIL_SHARDS * config.workers]
    if len(during) < 3:
        raise InputError(f"only {len(during)} shards of {bucket} were committed after warm-up: raise --samples")
    return during[0][0], during[-1][0], sum(count for _, count, _ in during[1:])


def _busy(run: Path, begun: float, ended: float) -> tuple[float, float]:
    """Returns the parts of a stretch of time in which kernels ran, and in which workers stood still for frames."""
    timeline = json.loads((run / "timeline.json").read_text())
    start, width = datetime.fromisoformat(timeline["start"]).timestamp(), timeline["bin_seconds"]
    first, last = int((begun - start) / width) + 1, int((ended - start) / width)
    kinds = {
        kind: np.array([worker["percent"][kind][first:last] for worker in timeline["workers"]]) / 100
        for kind in ("text", "vae", "wait")
    }
    busy = np.minimum(kinds["text"] + kinds["vae"], 1)
    return float(busy.mean()), float(np.minimum(kinds["wait"], 1 - busy).mean())


def _alone(job: PreprocessConfig, config: BenchmarkConfig) -> dict[str, dict[str, float]]:
    """Returns the rates of the encoders alone, by bucket, in a process of its own: the GPU is free after the job."""
    command = [sys.executable, "-m", "preprocess.encoders_alone", json.dumps(asdict(job)), str(config.alone_seconds)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(f"the encoders alone failed: {result.stderr[-2000:]}")
    rates: dict[str, dict[str, float]] = json.loads(result.stdout.splitlines()[-1])
    return rates


def _write(config: BenchmarkConfig, rows: list[Row]) -> None:
    value = {
        "device": _device(),
        "config": {name: str(value) for name, value in asdict(config).items()},
        "rows": [{**asdict(row), "of_alone": row.of_alone} for row in rows],
    }
    config.output.write_text(json.dumps(value, indent=2) + "\n")


def _device() -> dict[str, Any]:
    import diffusers
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| bucket | GPUs | seconds | samples/s | frames/s | GPU busy | data wait | alone, samples/s | of alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.bucket} | {row.workers} | {row.seconds:.0f} | {row.samples_per_second:.2f} | "
        f"{row.frames_per_second:.0f} | {row.busy:.1%} | {row.wait:.1%} | "
        f"{row.alone_samples_per_second * row.workers:.2f} | {row.of_alone:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures, writes and prints; returns 0."""
    config = tyro.cli(BenchmarkConfig, prog="python -m preprocess.benchmark")
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(config, config.models or Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
