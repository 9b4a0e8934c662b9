"""Measures stage 1 on the GPUs at hand, end to end through Ray: ``python -m preprocess.benchmark``.

T5-XXL and SD's autoencoder at their real sizes with random weights (speed does not depend on their values), real clips.
The encoders' own speed is measured first, in the same run, on the same kind of shards, from frames in memory (medians
over shards). Then a job for each decoder and each number of GPUs, with as many CPU cores for each GPU: busy is the time
in which the encoders' kernels ran, by events of the GPU, over wall time, after warm-up.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from preprocess.config import PreprocessConfig
from shared.clips.decode import Decoder
from shared.errors import InputError, run_entry_point
from shared.spec import Bucket
from shared.wording import counted

_TEXT = "a slow pan over hills and water while two people walk along the shore under heavy clouds at dusk"
_TAIL_SHARDS = 3
"""A worker, which do not count: towards the end workers run dry one after another."""

_LIMITS = ("CUDA_VISIBLE_DEVICES", "RAY_OVERRIDE_RESOURCES")
"""Variables by which Ray learns what a job may use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """Stage 1 from clips to a cache, against its encoders alone."""

    clips: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER ...")]
    """For each bucket a folder of .mp4 files that go into it, the nearest aspect ratio and the most pixels first; each
    is linked under as many names as there are samples."""
    output: Path
    """A JSON file, written anew once the encoders are measured and after each job; a table is printed."""
    buckets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TxHxW ...")] = ("64x512x512", "16x256x256")
    samples: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (576, 5800)
    """Of each bucket, a worker."""
    shard_samples: int = 64
    """Samples a shard."""
    workers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1,)
    """GPUs to use; a job for each number."""
    cpus_per_gpu: int | None = None
    """CPU cores that a job may use for each of its GPUs, and no more; None: all."""
    decoders: Annotated[tuple[Decoder, ...], tyro.conf.arg(metavar="DECODER ...")] = ("cpu",)
    """What decodes: cpu, nvdec or auto; a job for each."""
    warm_up_seconds: float = 5.0
    """After the first shard of a bucket is committed by each worker: not counted."""
    alone_seconds: float = 12.0
    """For the encoders alone, a bucket."""
    models: Path | None = None
    """A folder for the models and the caches; a temporary one by default."""
    tiny: bool = False
    """The demo's models: to see that everything runs, not to measure."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        if not len(self.buckets) == len(self.samples) == len(self.clips):
            raise InputError("--buckets, --samples, --clips: expected as many of each")
        cores = len(os.sched_getaffinity(0))
        if self.cpus_per_gpu is not None and self.cpus_per_gpu * max(self.workers) > cores:
            raise InputError(
                f"--cpus-per-gpu {self.cpus_per_gpu}: {counted(max(self.workers), 'worker')}, found {cores} cores"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one bucket gave in one job."""

    bucket: str
    decoder: Decoder
    workers: int
    cpu_cores: int
    """Of all workers together."""
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
    launching: "Launching"
    of_alone: float
    """Samples a second, as a part of what the encoders of all workers reach alone."""
    times_one: float | None
    """Samples a second, in multiples of one worker's with the same decoder; None if that was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launching:
    """What the threads that launched kernels were about: parts of the counted time, mean over the workers."""

    wait: float
    """For frames, whether the GPU had work meanwhile or not."""
    launch: float
    """Kernels on a GPU; on a CPU, encoding is of the rest."""
    ahead: float
    """The GPU had work enough."""
    rest: float
    """Frames to pinned memory, results on their way to the CPU, one shard after another, other threads' turns."""


Rates = dict[str, dict[str, float]]
"""By bucket, of one worker's encoders alone, from frames in memory: samples, frames (of the autoencoder by itself) and
tokens (of T5 by itself) a second; tokens of a sample."""


def measure(config: BenchmarkConfig, folder: Path) -> tuple[Rates, list[Row]]:
    """Returns the rates of the encoders alone, and a row for each job and bucket."""
    rows: list[Row] = []
    alone: Rates | None = None
    for decoder in config.decoders:
        for workers in sorted(set(config.workers)):
            job = _job(config, folder, decoder, workers)
            with _limited(config.cpus_per_gpu, workers) as cores:
                if alone is None:
                    alone, device = _alone(job, config)
                    print(json.dumps({**device, "alone": alone}, indent=2), flush=True)
                    _write(config, device, alone, rows)
                run = _run(job)
            rows += [
                _row(run, bucket, alone[bucket], config, rows, decoder=decoder, workers=workers, cores=cores)
                for bucket in config.buckets
            ]
            shutil.rmtree(job.output)
            _write(config, device, alone, rows)
            print(table(alone, rows), flush=True)
    assert alone is not None
    return alone, rows


def _job(config: BenchmarkConfig, folder: Path, decoder: Decoder, workers: int) -> PreprocessConfig:
    output = folder / f"cache-{decoder}-{workers}"
    shutil.rmtree(output, ignore_errors=True)
    return PreprocessConfig(
        manifest=str(_manifest(config, folder / "clips", workers)),
        output=str(output),
        probes=str(folder / "probes"),
        buckets=config.buckets,
        preset="demo" if config.tiny else None,
        vae=None if config.tiny else str(folder / "vae"),
        text_encoder=None if config.tiny else str(folder / "t5"),
        shard_samples=config.shard_samples,
        workers=workers,
        decoder=decoder,
    )


def _manifest(config: BenchmarkConfig, folder: Path, workers: int) -> Path:
    """Links the clips under many names, each with a caption of its own that fills the token limit."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, lines = _TEXT.split(), ["path,text"]
    for text, clips, samples in zip(config.buckets, config.clips, config.samples, strict=True):
        originals = sorted(clips.glob("*.mp4"))
        if not originals:
            raise InputError(f"--clips {clips}: found no .mp4 in it")
        for number in range(samples * workers):
            original = originals[number % len(originals)]
            name = f"{text}-{number:07}.mp4"
            if not (folder / name).exists():
                try:
                    os.link(original, folder / name)
                except OSError:
                    os.symlink(original.absolute(), folder / name)
            words = [vocabulary[(number * 7 + place * (1 + number % 5)) % len(vocabulary)] for place in range(160)]
            lines.append(f"{name},clip {number} of {' '.join(words)}")
    path = folder / f"clips-{workers}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@contextlib.contextmanager
def _limited(cpus_per_gpu: int | None, workers: int) -> Iterator[int]:
    """Lets this process and those that it starts see so many GPUs, and cores for them; yields how many cores."""
    cores, kept = os.sched_getaffinity(0), {name: os.environ.get(name) for name in _LIMITS}
    count = len(cores) if cpus_per_gpu is None else cpus_per_gpu * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(workers)]
    os.environ.update(zip(_LIMITS, (",".join(gpus[:workers]), json.dumps({"CPU": count})), strict=True))
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield count
    finally:
        os.sched_setaffinity(0, cores)
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _run(job: PreprocessConfig) -> Path:
    """Runs stage 1 and returns the folder of the run."""
    from preprocess.job.driver import run_job

    report = run_job(job)
    print(report.table(), flush=True)
    assert report.run_url is not None
    return Path(report.run_url)


def _row(
    run: Path,
    text: str,
    alone: dict[str, float],
    config: BenchmarkConfig,
    rows: list[Row],
    *,
    decoder: Decoder,
    workers: int,
    cores: int,
) -> Row:
    bucket = Bucket.parse(text)
    begun, ended, num_samples = _committed(run, text, config, workers, is_last=text == config.buckets[-1])
    busy, wait, launching = _busy(run, begun, ended)
    rate = num_samples / (ended - begun)
    ones = [row.samples_per_second for row in rows if (row.bucket, row.decoder, row.workers) == (text, decoder, 1)]
    return Row(
        bucket=text,
        decoder=decoder,
        workers=workers,
        cpu_cores=cores,
        samples=num_samples,
        seconds=ended - begun,
        samples_per_second=rate,
        frames_per_second=rate * bucket.num_frames,
        tokens_per_second=rate * alone["tokens_a_sample"],
        busy=busy,
        wait=wait,
        launching=launching,
        of_alone=rate / (alone["samples_per_second"] * workers),
        times_one=rate / ones[0] if ones else None,
    )


def _committed(
    run: Path, bucket: str, config: BenchmarkConfig, workers: int, *, is_last: bool
) -> tuple[float, float, int]:
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
        during = during[: len(during) - _TAIL_SHARDS * workers]
    if len(during) < 3:
        raise InputError(f"of {bucket} only {counted(len(during), 'shard')} committed after warm-up: raise --samples")
    return during[0][0], during[-1][0], sum(count for _, count, _ in during[1:])


def _busy(run: Path, begun: float, ended: float) -> tuple[float, float, Launching]:
    """Returns the parts of a stretch of time in which kernels ran, in which workers stood still for frames, and what
    their launching threads were about."""
    timeline = json.loads((run / "timeline.json").read_text())
    start, width = datetime.fromisoformat(timeline["start"]).timestamp(), timeline["bin_seconds"]
    first, last = int((begun - start) / width) + 1, int((ended - start) / width)
    kinds = {
        kind: np.array([worker["percent"][kind][first:last] for worker in timeline["workers"]]) / 100
        for kind in ("text", "vae", "wait", "launch", "ahead")
    }
    busy = np.minimum(kinds["text"] + kinds["vae"], 1)
    threads = {kind: float(kinds[kind].mean()) for kind in ("wait", "launch", "ahead")}
    launching = Launching(**threads, rest=max(1 - sum(threads.values()), 0.0))
    return float(busy.mean()), float(np.minimum(kinds["wait"], 1 - busy).mean()), launching


def _alone(job: PreprocessConfig, config: BenchmarkConfig) -> tuple[Rates, dict[str, Any]]:
    """Returns the rates, and what they were measured on, of a process of its own: the GPU is free after it.

    It makes the models, too, where they are not there yet.
    """
    command = [sys.executable, "-m", "preprocess.encoders_alone", json.dumps(asdict(job)), str(config.alone_seconds)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(f"the encoders alone failed: {result.stderr[-2000:]}")
    answer = json.loads(result.stdout.splitlines()[-1])
    return answer["rates"], answer["device"]


def _write(config: BenchmarkConfig, device: dict[str, Any], alone: Rates, rows: list[Row]) -> None:
    value = {
        "device": {**device, "machine_cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")},
        "config": {name: str(value) for name, value in asdict(config).items()},
        "alone": alone,
        "rows": [asdict(row) for row in rows],
    }
    config.output.write_text(json.dumps(value, indent=2) + "\n")


def table(alone: Rates, rows: list[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| bucket | decoder | GPUs | cores | seconds | samples/s | frames/s | GPU busy | data wait "
        "| alone, samples/s | of alone | times one GPU "
        "| launching thread: launches, waits for the GPU, for frames, rest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.bucket} | {row.decoder} | {row.workers} | {row.cpu_cores} | {row.seconds:.0f} | "
        f"{row.samples_per_second:.2f} | {row.frames_per_second:.0f} | {row.busy:.1%} | {row.wait:.1%} | "
        f"{alone[row.bucket]['samples_per_second'] * row.workers:.2f} | {row.of_alone:.1%} | "
        f"{'' if row.times_one is None else f'{row.times_one:.3f}'} | "
        + ", ".join(
            f"{part:.0%}"
            for part in (row.launching.launch, row.launching.ahead, row.launching.wait, row.launching.rest)
        )
        + " |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures, writes and prints; returns 0."""
    config = tyro.cli(BenchmarkConfig, prog="python -m preprocess.benchmark")
    with tempfile.TemporaryDirectory() as folder:
        measure(config, config.models or Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main, debug="--debug" in sys.argv))
