"""``python -m train.benchmark loader``: how fast batches come from a cache, beside raw reads and other loaders.

Random samples are written once for each codec. Then everything is read in turn, cold and warm, as often as asked, each
time in a process of its own; medians count.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from shared.cache.commit import ShardWriter
from shared.cache.dataset import Cache
from shared.cache.identity import latent_id, shard_id, text_id
from shared.cache.rows import Sample, Text, sample_row
from shared.codec import Codec
from shared.errors import InputError
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.benchmark.loader_rivals import READERS, WRITERS, drop_from_page_cache
from train.benchmark.results import make_room, write_results

_GEOMETRY = VaeGeometry(latent_channels=4, spatial_stride=8)
_RAW, _OURS = "raw", "latentmill"
_READ_BYTES = 8 * 1024 * 1024
_SAMPLES_A_SHARD = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderBenchmark:
    """Measures the loader beside raw reads of the same files, webdataset, mosaicml-streaming and litdata."""

    output: Path | None = None
    """A JSON file for the results."""
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()) / "latentmill-loader-benchmark")
    """For the samples: on the disk that is to be measured. They are kept, and used again if they fit."""
    samples: int = 2000
    """Samples in an epoch."""
    bucket: str = "1x256x256"
    """FRAMESxHEIGHTxWIDTH; 4 latent channels, 8 times smaller."""
    tokens: int = 120
    """Of each caption."""
    text_channels: int = 4096
    """Of each token."""
    codecs: tuple[str, ...] = ("bfloat16", "bfloat16+zstd", "int8@37+zstd")
    """Of latents and, without +delta and with @30 for @37, of texts; first bfloat16, which the rivals get."""
    batch_size: int = 32
    """Samples of a batch."""
    num_workers: int = 2
    """Processes that read."""
    repeats: int = 3
    """Times that each is measured."""
    rivals_python: Path | None = None
    """A Python in whose environment rivals are installed; webdataset is also looked for in this one."""
    cache: str | None = None
    """Measure reading of this cache alone, such as s3://bucket/prefix, and how long steps wait for it."""
    step_seconds: float = 0.0
    """With --cache: how long each step computes."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if self.codecs[:1] != ("bfloat16",):
            raise InputError(f"codecs {' '.join(self.codecs)}: expected bfloat16 first, which the rivals read")
        if self.samples < 10 * self.batch_size:
            raise InputError(f"samples={self.samples}: expected at least 10 batches, {10 * self.batch_size}")
        if self.rivals_python is not None and not self.rivals_python.is_file():
            raise InputError(
                f"--rivals-python {self.rivals_python}: no such file: expected a Python, such as R/bin/python"
            )
        if self.step_seconds and self.cache is None:
            raise InputError("step_seconds does nothing without --cache")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one reader did, cold or warm: medians."""

    reader: str
    temperature: str
    samples_per_second: float | None
    """None: it did not run, ``note`` says why."""
    delivered_gb_per_second: float | None
    """Of latents and captions as the trainer gets them, without padding."""
    stored_gb_per_second: float | None
    """Of what lies on the disk."""
    of_raw: float | None
    """Its stored bytes a second, of those of raw reads."""
    ours_over_it: float | None
    """This project's samples a second with codec bfloat16, over its."""
    note: str = ""


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, writes the results and returns the exit code."""
    config = tyro.cli(LoaderBenchmark, prog="python -m train.benchmark loader", args=arguments)
    make_room(config.output)
    if config.cache is not None:
        results: dict[str, Any] = _measure_waits(config, config.cache)
        print(json.dumps(results, indent=2))
    else:
        rows = _measure_all(config)
        print(_table(rows))
        results = {"config": _plain(config), "machine": _machine(), "rows": [asdict(row) for row in rows]}
    if config.output is not None:
        write_results(config.output, results)
    return 0


def _measure_all(config: LoaderBenchmark) -> list[Row]:
    caches = {codec: _write_samples(config, codec) for codec in config.codecs}
    stored = {codec: _num_bytes(cache) for codec, cache in caches.items()}
    pythons, notes = _find_rivals(config)
    for rival, python in pythons.items():
        if rival in WRITERS and not (config.folder / rival).is_dir():
            _run_rival(config, rival, python, caches["bfloat16"], "write", cold=False)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(config.repeats):
        for temperature in ("cold", "warm"):
            cold = temperature == "cold"
            found.setdefault((_RAW, temperature), []).append(_read_raw(caches["bfloat16"], cold=cold))
            for codec, cache in caches.items():
                found.setdefault((f"{_OURS} {codec}", temperature), []).append(_run_ours(config, str(cache), cold=cold))
            for rival, python in pythons.items():
                result = _run_rival(config, rival, python, caches["bfloat16"], "read", cold=cold)
                found.setdefault((rival, temperature), []).append(result)
    return _rows(config, found, stored, notes)


def _rows(
    config: LoaderBenchmark,
    found: dict[tuple[str, str], list[dict[str, Any]]],
    stored: dict[str, int],
    notes: dict[str, str],
) -> list[Row]:
    rows = []
    for temperature in ("cold", "warm"):

        def rate(reader: str, name: str, temperature: str = temperature) -> float:
            return statistics.median(result[name] / result["seconds"] for result in found[reader, temperature])

        raw = rate(_RAW, "delivered_bytes")
        ours = rate(f"{_OURS} bfloat16", "samples")
        rows.append(Row(reader=_RAW, temperature=temperature, samples_per_second=None, delivered_gb_per_second=None,
                        stored_gb_per_second=raw / 1e9, of_raw=1.0, ours_over_it=None))  # fmt: skip
        readers = [*(f"{_OURS} {codec}" for codec in config.codecs), *READERS]
        for reader in readers:
            if (reader, temperature) not in found:
                rows.append(Row(reader=reader, temperature=temperature, samples_per_second=None, note=notes[reader],
                                delivered_gb_per_second=None, stored_gb_per_second=None, of_raw=None,
                                ours_over_it=None))  # fmt: skip
                continue
            codec = reader.removeprefix(f"{_OURS} ")
            samples = rate(reader, "samples")
            of_disk = samples * stored.get(codec, stored["bfloat16"]) / config.samples
            rows.append(
                Row(
                    reader=reader,
                    temperature=temperature,
                    samples_per_second=samples,
                    delivered_gb_per_second=rate(reader, "delivered_bytes") / 1e9,
                    stored_gb_per_second=of_disk / 1e9,
                    of_raw=of_disk / raw,
                    ours_over_it=ours / samples,
                )
            )
    return rows


def _table(rows: Sequence[Row]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| reader | | samples/s | GB/s delivered | GB/s from disk | of raw | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            number(row.samples_per_second, ".0f"),
            number(row.delivered_gb_per_second, ".2f"),
            number(row.stored_gb_per_second, ".2f"),
            number(row.of_raw, ".0%"),
            number(row.ours_over_it, ".2f") or row.note,
        ]
        lines.append(f"| {row.reader} | {row.temperature} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measure_waits(config: LoaderBenchmark, cache: str) -> dict[str, Any]:
    Cache.open(cache)  # says what is wrong in one line, where a process would in many
    result = _run_ours(config, cache, cold=False, step_seconds=config.step_seconds)
    waits = sorted(result["wait_seconds"])
    steps = len(waits)
    return {
        "config": _plain(config),
        "samples_per_second": result["samples"] / result["seconds"],
        "median_wait_ms": 1000 * statistics.median(waits),
        "longest_wait_ms": 1000 * waits[-1],
        "waiting": sum(waits) / result["seconds"],
        "steps": steps,
    }


def _run_ours(config: LoaderBenchmark, cache: str, *, cold: bool, step_seconds: float = 0.0) -> dict[str, Any]:
    settings = {
        "cache": cache,
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "num_batches": config.samples // config.batch_size,
        "index_folder": str(config.folder / "local"),
        "cold": cold,
        "step_seconds": step_seconds,
    }
    return _run([sys.executable, "-m", "train.benchmark.loader_ours", json.dumps(settings)])


def _run_rival(
    config: LoaderBenchmark, rival: str, python: str, cache: Path, task: str, *, cold: bool
) -> dict[str, Any]:
    settings = {
        "rival": rival,
        "task": task,
        "cache": str(cache),
        "folder": str(config.folder / rival),
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "cold": cold,
    }
    script = Path(__file__).with_name("loader_rivals.py")
    return _run([python, str(script), json.dumps(settings)])


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command[:3])} ended with code {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _find_rivals(config: LoaderBenchmark) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the Python for each rival that is installed, and why others are not measured."""
    modules = {"webdataset": "webdataset", "mosaicml-streaming": "streaming", "litdata": "litdata"}
    pythons, notes = {}, {}
    for rival, module in modules.items():
        candidates = [str(config.rivals_python)] if config.rivals_python else []
        for python in [*candidates, sys.executable]:
            if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0:
                pythons[rival] = python
                break
        else:
            notes[rival] = (
                f"not installed: python -m venv R; R/bin/pip install torch {rival}; --rivals-python R/bin/python"
            )
    return pythons, notes


def _read_raw(cache: Path, *, cold: bool) -> dict[str, Any]:
    """Reads all shards in order, 8 MiB at a time into the same memory."""
    shards = sorted(cache.glob("shards/*/*"))
    if cold:
        drop_from_page_cache(str(cache))
    memory = bytearray(_READ_BYTES)
    total, start = 0, time.perf_counter()
    for shard in shards:
        descriptor, offset = os.open(shard, os.O_RDONLY), 0
        while count := os.preadv(descriptor, [memory], offset):
            offset += count
        os.close(descriptor)
        total += offset
    return {"delivered_bytes": total, "seconds": time.perf_counter() - start}


def _write_samples(config: LoaderBenchmark, codec: str) -> Path:
    """Returns a cache of random samples in one codec, made if it is not there."""
    bucket = Bucket.parse(config.bucket)
    shape = latent_shape(bucket, _GEOMETRY)
    name = f"{codec}-{config.samples}-{bucket}-{config.tokens}x{config.text_channels}"
    root = config.folder / name
    codecs = {"latent": Codec.parse(codec), "text.t5": Codec.parse(codec.replace("+delta", "").replace("@37", "@30"))}
    cache = Cache.open_or_create(root, _provenance(config))
    if cache.index_files().paths() and cache.read_index(["fps"]).num_rows == config.samples:
        return root
    generator = torch.Generator().manual_seed(0)
    for start in range(0, config.samples, _SAMPLES_A_SHARD):
        numbers = range(start, min(start + _SAMPLES_A_SHARD, config.samples))
        ids = [latent_id(source=str(n), source_version="1", bucket=bucket, frame_interval=1) for n in numbers]
        writing = ShardWriter(
            cache.store, shard_id=shard_id(ids, streams=codecs), folder=str(bucket), container="tar", record={}
        )
        with writing as writer:
            for number, identity in zip(numbers, ids, strict=True):
                embedding = 0.1 * torch.randn(config.tokens, config.text_channels, generator=generator)
                sample = Sample(
                    sample=identity,
                    source=str(number),
                    source_version="1",
                    bucket=bucket,
                    frame_interval=1,
                    fps=8.0,
                    latent=torch.randn(shape, generator=generator),
                    texts={"text.t5": [Text(id=text_id(str(number)), caption=str(number), embedding=embedding)]},
                )
                writer.add(*sample_row(sample, codecs, 0))
            writer.commit()
    return root


def _provenance(config: LoaderBenchmark) -> dict[str, dict[str, Any]]:
    latent = {"latent_channels": _GEOMETRY.latent_channels, "spatial_stride": 8, "temporal_stride": 1}
    text = {"text_channels": config.text_channels, "max_tokens": config.tokens}
    made = {"model": "random", "weights_sha256": "", "precision": "float32"}
    return {"latent": {**made, **latent, "posterior": "sample"}, "text.t5": {**made, **text}}


def _num_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("shards/*/*"))


def _plain(config: LoaderBenchmark) -> dict[str, Any]:
    hidden = {"output", "folder", "rivals_python", "debug"}
    return {name: value for name, value in asdict(config).items() if name not in hidden}


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "torch": torch.__version__}
