"""Where a run's checkpoints lie and what is in them. Free of deepspeed, for whoever only reads weights."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import InputError
from train.tensor_file import FileRecord

FOLDER = "checkpoints"
WEIGHTS_FILE, EMA_FILE, STATE_FILE = "model.safetensors", "ema.safetensors", "state.json"
OPTIMISER_FILE, RANDOM_FILE = "optimizer.safetensors", "random.safetensors"
FORMAT = 2
_NAME = re.compile(r"^step-(\d{8})$")


def checkpoint_name(step: int) -> str:
    """Returns the name of the checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if _NAME.match(name)]


def superfluous(checkpoints: Sequence[Path], *, newest: int, every: int | None) -> list[Path]:
    """Returns which of a run's checkpoints are not to be kept.

    Args:
        checkpoints: Oldest first.
        newest: So many of the newest are kept.
        every: So are those after a multiple of so many steps, for good; none if None.
    """
    old = checkpoints[: max(0, len(checkpoints) - newest)]
    return [path for path in old if every is None or int(path.name.removeprefix("step-")) % every]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint says of itself.

    Raises:
        InputError: if it says nothing, or was written in another format.
    """
    file = checkpoint / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}): is this folder on a file system that all nodes share? A damaged "
            "checkpoint may be deleted; the run then goes on from the one before"
        ) from None
    if state.get("format") != FORMAT:
        raise InputError(
            f"{checkpoint}: found a checkpoint of format {state.get('format', 1)}, expected {FORMAT}: go on with the "
            "version that wrote it, or start a new run"
        )
    return state


def require_intact(checkpoint: Path, names: Sequence[str]) -> None:
    """Raises :class:`InputError` if one of a checkpoint's files is not what was written."""
    records = read_state(checkpoint)["files"]
    for name in names:
        path, expected = checkpoint / name, FileRecord(**records[name])
        found = FileRecord.of(path) if path.is_file() else None
        if found != expected:
            raise InputError(
                f"{path}: found {found}, expected {expected}: the file is damaged; delete {checkpoint}, and the run "
                "goes on from the checkpoint before"
            )
