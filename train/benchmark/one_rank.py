"""A row of one rank beside one of several, measured in the same command: what several are compared with.

Rank 0 runs the same benchmark as a process of its own, a world of one on the same GPU, while the others wait without
work. So both figures are of one machine within a minute or two, and no part of the one knows of the other.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.errors import InputError
from train.benchmark.step_settings import Setting
from train.benchmark.steps import StepRow, Timing
from train.parallel.ranks import Ranks

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHERS_OWN = ("TORCHELASTIC_", "TORCH_NCCL_", "GROUP_", "ROLE_", "SLURM_", "PMI", "OMPI_")


def measure_one_rank(
    name: str,
    setting: Setting,
    ranks: Ranks,
    timing: Timing,
    model_settings: tuple[str, ...],
    device_memory_gib: float | None,
) -> list[StepRow]:
    """Returns the rows of one rank with the model, size and batch of a setting. All ranks call it.

    Args:
        name: Of the benchmark.
        setting: Of several ranks.
        ranks: Of the benchmark.
        timing: How long to measure.
        model_settings: As the command line takes them.
        device_memory_gib: Likewise.

    Raises:
        InputError: if that process fails.
    """
    mine = ranks.agree(lambda: _run(name, setting, timing, model_settings, device_memory_gib) if ranks.is_first else [])
    return [StepRow(**row) for row in ranks.from_first(mine)]


def _run(
    name: str, setting: Setting, timing: Timing, model_settings: tuple[str, ...], device_memory_gib: float | None
) -> list[dict[str, Any]]:
    environment = {
        key: value for key, value in os.environ.items() if key not in _LAUNCHER and not key.startswith(_LAUNCHERS_OWN)
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "one.json"
        command = [sys.executable, "-m", "train.benchmark", name, "--output", str(output)]
        command += ["--only", f"{setting.model} {setting.frames}x{setting.size}", "--variants"]
        command += [variant.name for variant in setting.variants]
        command += ["--batch", str(setting.batch), "--warmup", str(timing.warmup), "--steps", str(timing.steps)]
        command += ["--checkpointing", setting.checkpointing]
        if device_memory_gib is not None:
            command += ["--device-memory-gib", str(device_memory_gib)]
        if model_settings:
            command += ["--set", *model_settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{setting.name}: the same on one GPU did not run: {done.stderr[-600:]}")
        rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
        return rows
