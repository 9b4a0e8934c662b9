"""Where a run's checkpoints lie and what is in them. Free of deepspeed, for whoever only reads weights."""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"
WEIGHTS_FILE, EMA_FILE, STATE_FILE = "model.safetensors", "ema.safetensors", "state.json"
_NAME = re.compile(r"^step-(\d{8})$")


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    folder = run / FOLDER
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in names if _NAME.match(name)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: ``step`` and ``world_size``."""
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return state
