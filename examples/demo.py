"""The whole path on the clips of the tests, by the commands that a user types: `make demo`.

Estimate, encode on Ray, verify, estimate against the bytes on disk, train from the cache, sample, and look. Each
command is printed before it runs. Ends what it started, also on Ctrl-C.
"""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from examples.ray_head import RayHead

ROOT = Path(__file__).parent.parent
MANIFEST = "tests/data/clips/clips.csv"
LOOK_BUCKET, TRAIN_BUCKET = "16x256x256", "4x48x48"

TRAINING = [
    *("--model", "stdit-ti/2", "--set", "depth=4", "hidden_size=64", "num_heads=2", "patch_size=[1,1,1]"),
    *("--buckets", TRAIN_BUCKET, "--batch-size", "18", "--steps", "1000", "--lr", "5e-3", "--warmup-steps", "50"),
    *("--ema-decay", "0.99", "--zero-stage", "2", "--precision", "bfloat16", "--num-workers", "0"),
    *("--log-every", "50", "--checkpoint-every", "500"),
]
"""Overfits a tiny model on the few clips within minutes on two cores. Patches of one latent pixel: a width of 64 must
carry a whole patch of noise, and 2x2 pixels of 16 channels fill it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run stage 1, the estimator and stage 2 on six short clips, and make pictures of the results."""

    output: Path
    """A folder for the cache, the run and the pictures. An earlier demo's results in it are removed."""


class Demo:
    """Runs commands in the checkout, showing each and its time."""

    def __init__(self, output: Path) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        tools = Path(sys.executable).parent
        self._environment["PATH"] = f"{tools}{os.pathsep}{self._environment.get('PATH', '')}"
        self.output = output

    def run(self, title: str, *command: object, environment: dict[str, str] | None = None) -> None:
        """Runs one command and waits for it; an error ends the demo."""
        words = [str(word) for word in command]
        print(f"\n== {title}\n$ {shlex.join(words)}", flush=True)
        started = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, env=environment or self._environment)
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        if code:
            raise subprocess.CalledProcessError(code, words)
        print(f"   ({time.monotonic() - started:.0f} s)", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and all that it started: torchrun's ranks are in sessions of their own."""
    tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=10)
    for each in alive:
        each.kill()
    process.wait()


def prompts() -> list[str]:
    """Returns the first caption of every clip that is a video."""
    with open(ROOT / MANIFEST, newline="") as file:
        first: dict[str, str] = {}
        for row in csv.DictReader(file):
            first.setdefault(row["path"], row["text"])
    return [text for path, text in first.items() if path != "not_a_video.mp4"]


def demo(output: Path) -> None:
    """Runs every step."""
    started = time.monotonic()
    cache, run, samples = output / "cache", output / "run", output / "samples"
    output.mkdir(parents=True, exist_ok=True)
    for earlier in (cache, run, samples):
        shutil.rmtree(earlier, ignore_errors=True)
    steps = Demo(output)
    estimate = ("python", "-m", "storage_estimates")
    steps.run(
        "What would 10 million clips cost?",
        *estimate,
        *("--clips", "10_000_000", "--frames", 64, "--size", 512, "--tokens", 120),
    )
    print("\n== A Ray head of our own, on loopback, with a token", flush=True)
    with RayHead(output / "ray.log") as head:
        steps.run(
            "Stage 1: encode the clips",
            *("ray", "job", "submit", "--address", head.job_address, "--working-dir", ".", "--"),
            *("python", "-m", "preprocess", "--preset", "demo", "--manifest", MANIFEST, "--output", cache),
            *("--buckets", LOOK_BUCKET, TRAIN_BUCKET, "--buckets-per-clip", "all"),
            environment=head.environment | {"RAY_LOG_TO_STDERR": "0", "OMP_NUM_THREADS": "1"},
        )
    steps.run(
        "Is the cache sound?",
        *("python", "-m", "preprocess.verify", cache, "--decode", 6, "--clips", Path(MANIFEST).parent),
    )
    steps.run("Predicted bytes against the bytes on disk", *estimate, "--cache", cache)
    steps.run(
        "Stage 2: train STDiT from the cache on two ranks, with DeepSpeed ZeRO-2",
        *("torchrun", "--standalone", "--nproc-per-node", 2, "-m", "train", "--cache", cache, "--output", run),
        *TRAINING,
    )
    prompt_options = [word for prompt in prompts() for word in ("--prompt", prompt)]
    steps.run(
        "Generate a video for each caption",
        *("python", "-m", "train.sample", "--run", run, "--output", samples, "--guidance", 2),
        *prompt_options,
    )
    steps.run(
        "Look: clip, reconstruction and generated frames side by side",
        *("python", "-m", "examples.demo_pictures", "--cache", cache, "--run", run, "--samples", samples),
        *("--clips", Path(MANIFEST).parent, "--output", output),
        *("--look-bucket", LOOK_BUCKET, "--train-bucket", TRAIN_BUCKET),
    )
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")


def main() -> int:
    """Returns 0 if every step succeeded."""
    config = tyro.cli(DemoConfig, prog="make demo")
    # A polite end is an orderly one: what was started is ended before we go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        demo(config.output.absolute())
    except subprocess.CalledProcessError as error:
        print(f"error: this step ended with exit code {error.returncode}: see its output above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was started has been ended", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
