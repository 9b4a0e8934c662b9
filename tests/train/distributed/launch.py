"""Checks that several ranks make together: one launch runs many, since starting ranks costs more than most checks.

A check is a function of :class:`Ranks` and a folder that all ranks see; it fails by an exception on any rank. What a
check raises ends the launch, for the other ranks wait for that one; the checks after it count as failed.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from train.parallel.ranks import join_ranks

ROOT = Path(__file__).parents[3]


def run_checks(module: str, names: list[str], folder: Path, *, num_ranks: int, device: str = "cpu") -> dict[str, str]:
    """Returns what became of each check: ``ok``, or why not.

    Args:
        module: Where the checks are, functions of these names.
        names: Run in this order.
        folder: For the checks' files.
        num_ranks: Processes, under torchrun.
        device: ``cpu`` (gloo), or ``cuda`` (NCCL), a device a rank.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [*torchrun, "-m", "tests.train.distributed.launch", module, str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540, check=False)
    results = dict.fromkeys(names, f"was not reached; the ranks said: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    for file in sorted(folder.glob("result-*.jsonl")):
        for line in file.read_text().splitlines():
            name, outcome = json.loads(line)
            if outcome != "ok" or "was not reached" in results[name]:
                results[name] = outcome
    return results


def _main(module: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 is computed in float32
    with join_ranks() as ranks:
        checks = importlib.import_module(module)
        with (folder / f"result-{ranks.rank}.jsonl").open("a", buffering=1) as results:
            for name in names:
                place = folder / name
                place.mkdir(exist_ok=True)
                try:
                    getattr(checks, name)(ranks, place)
                    ranks.barrier()
                except BaseException:
                    results.write(json.dumps([name, f"rank {ranks.rank}: {traceback.format_exc()}"]) + "\n")
                    os._exit(1)
                results.write(json.dumps([name, "ok"]) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
