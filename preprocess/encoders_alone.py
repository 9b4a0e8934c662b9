"""How fast a worker's encoders are by themselves, on shards in memory: for ``preprocess.benchmark``.

Captions are tokens and clips are frames already, as a job prepares them while its GPU is at work.

``python -m preprocess.encoders_alone CONFIG SECONDS`` prints JSON, from the options of a job as JSON. It makes the
models that the options name, of real sizes with random weights, if they are not there.
"""

import csv
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from preprocess.config import PreprocessConfig
from preprocess.encoders import Encoders
from shared.encoders.full_size import write_sd_vae, write_t5_xxl
from shared.media.clip import Media, centre_window
from shared.media.probe import probe
from shared.media.video import decode_window
from shared.spec import Bucket

_DIFFERENT_CLIPS = 8


def rates(config: PreprocessConfig, seconds: float) -> dict[str, dict[str, float]]:
    """Returns by bucket: samples, frames and tokens a second, medians over shards, and the tokens of a sample."""
    _make_models(config)
    encoders = Encoders(config.resolved())  # finds its micro-batch as a job does that makes a new cache
    return {str(bucket): _rates(encoders, config, bucket, seconds) for bucket in config.parsed_buckets()}


def _make_models(config: PreprocessConfig) -> None:
    """Writes the models of real sizes that are not there yet."""
    if config.preset is None:
        assert config.text_encoder is not None
        assert config.vae is not None
        if not (Path(config.vae) / "config.json").exists():
            write_t5_xxl(Path(config.text_encoder))
            write_sd_vae(Path(config.vae))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _rates(encoders: Encoders, config: PreprocessConfig, bucket: Bucket, seconds: float) -> dict[str, float]:
    assert encoders.vae is not None
    assert encoders.text is not None
    manifest = Path(config.manifest)
    with open(manifest, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith(f"{bucket}-")][: config.shard_samples]
    frames: list[np.ndarray] = []
    for row in rows[:_DIFFERENT_CLIPS]:
        media = Media(url=str(manifest.parent / row["path"]))
        window = centre_window(probe(media)[0].num_frames, num_frames=bucket.num_frames, interval=1)
        frames.append(decode_window(media, None, window, bucket))
    captions = encoders.text.prepare([row["text"] for row in rows])
    clips = [(str(number), frames[number % len(frames)]) for number in range(len(rows))]

    def text() -> None:
        encoders.text.encode_prepared(captions)  # type: ignore[union-attr]

    def vae() -> None:
        for _ in encoders.vae.encode_each(clips):  # type: ignore[union-attr]
            pass

    def both() -> None:
        text()
        vae()

    encoders.take_tokens()
    both()  # compiles
    tokens = encoders.take_tokens()
    return {
        "samples_per_second": len(clips) / _seconds(both, seconds / 2),
        "frames_per_second": len(clips) * bucket.num_frames / _seconds(vae, seconds / 4),
        "tokens_per_second": tokens / _seconds(text, seconds / 4),
        "tokens_a_sample": tokens / len(clips),
    }


def _seconds(encode: Callable[[], None], seconds: float) -> float:
    """Returns how long a shard takes, the median of those of so many seconds, at least three."""
    on_gpu = torch.cuda.is_available()
    encode()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        encode()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def main(options: str, seconds: str) -> None:
    """Prints the rates."""
    values: Any = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(options).items()
    }
    print(json.dumps({"rates": rates(PreprocessConfig(**values), float(seconds)), "device": _device()}))


def _device() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_memory": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("av", "diffusers", "pillow", "ray", "transformers")},
    }


def _cpu() -> str:
    """Returns the processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main(*sys.argv[1:])
