"""Where a run's numbers and pictures are shown: TensorBoard's files, Weights & Biases."""

import hashlib
import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shared.errors import InputError
from shared.stores.files import explained, make_folder
from train.config import LogOptions


class Board(Protocol):
    """What shows numbers and pictures by step."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers by name."""

    def clip(self, step: int, name: str, strip: np.ndarray, file: Path, caption: str) -> None:
        """Shows a video: frames (height, width * n, 3) side by side, and the MP4."""


def require_boards(options: LogOptions) -> None:
    """Raises :class:`InputError` if a package that is asked for is not installed."""
    for wanted, package in ((options.tensorboard, "tensorboard"), (options.wandb is not None, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"--{package}: the package is not installed: pip install 'latentmill[{package}]'")


def open_boards(options: LogOptions, run: Path, config: Mapping[str, Any], first_step: int) -> Sequence[Board]:
    """Returns the boards that are asked for.

    Args:
        options: Which.
        run: The run's folder.
        config: Of the run, as JSON values.
        first_step: Where this process begins.
    """
    boards: list[Board] = []
    if options.tensorboard:
        boards.append(_TensorBoard(run, first_step))
    if options.wandb is not None:
        boards.append(_WandB(options.wandb, run, config))
    return boards


class _TensorBoard:
    """One file of TensorBoard's records, written here and now: its own writer has a thread, which dies with a traceback
    where a disk is full."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = importlib.import_module("torch.utils.tensorboard.summary")
        records = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._folder = run / "tensorboard"
        # TensorBoard reads a run's files by name, so time goes first.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        with explained("beginning for TensorBoard", folder=self._folder):
            make_folder(self._folder)
            self._records = records.RecordWriter(open(self._folder / name, "xb"))  # noqa: SIM115  (as long as the run)
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(self._events.Event(file_version="brain.Event:2"))
        self._write(self._events.Event(step=first_step + 1, session_log=started))  # later steps of before are dropped

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._write(*(self._shown(step, self._summaries.scalar(name, value)) for name, value in values.items()))

    def clip(self, step: int, name: str, strip: np.ndarray, file: Path, caption: str) -> None:
        self._write(self._shown(step, self._summaries.image(f"previews/{name}", strip, dataformats="HWC")))

    def _shown(self, step: int, summary: Any) -> Any:
        return self._events.Event(step=step, summary=summary)

    def _write(self, *events: Any) -> None:
        with explained("writing for TensorBoard", folder=self._folder):
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()


class _WandB:
    """Its own settings (WANDB_MODE=offline, WANDB_API_KEY ...) are read from the environment, as usual."""

    def __init__(self, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self._wandb = importlib.import_module("wandb")
        place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]  # many a folder is called "run"
        self._run = self._wandb.init(
            project=project,
            dir=str(run),
            name=run.name,
            id=f"{run.name}-{place}",
            resume="allow",
            config=dict(config),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def clip(self, step: int, name: str, strip: np.ndarray, file: Path, caption: str) -> None:
        self._run.log({f"previews/{name}": self._wandb.Video(str(file), caption=caption)}, step=step)
