"""``python -m train.benchmark NAME ...``: what the trainer's parts do in a second."""

import importlib
import sys

from shared.errors import InputError, run_entry_point
from train.ending import end_process

_BENCHMARKS = {
    "codec_loss": "train.benchmark.codec_loss",
    "products_loss": "train.benchmark.products_loss",
    "loader": "train.benchmark.loader",
    "images": "train.benchmark.images",
    "stdit": "train.benchmark.stdit",
    "online": "train.benchmark.online",
    "kernels": "train.benchmark.kernels",
    "attention": "train.benchmark.attention_kernels",
    "products": "train.benchmark.products",
}


def main() -> int:
    """Runs the benchmark that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(f"usage: python -m train.benchmark {{{','.join(_BENCHMARKS)}}} ...; NAME --help says what is measured")
        return 0
    if name not in _BENCHMARKS:
        raise InputError(f"benchmark {name!r}: expected one of {', '.join(_BENCHMARKS)}")
    code: int = importlib.import_module(_BENCHMARKS[name]).main(sys.argv[2:])
    return code


if __name__ == "__main__":
    end_process(lambda: run_entry_point(main, debug="--debug" in sys.argv))
