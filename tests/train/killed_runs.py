"""Runs that are killed, each at another point, and started again; a program of its own, for its processes die.

It imports once and forks: a child trains until it kills itself with SIGKILL, the next child starts the same run again.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import train.checkpoint
import train.trainer
from train.checkpoint_files import STATE_FILE
from train.config import TrainConfig
from train.parallel import lean_zero
from train.parallel.ranks import join_ranks
from train.tensor_file import TensorFile

POINTS = ("during a step", "inside a file", "after the rename", "while an old one is removed")
MORE_POINTS = (
    "before the first file",
    "before the state is written",
    "before the rename",
    "before an old one loses its name",
)
"""All but the first of all while the checkpoint of step 4 is saved, when there is one of step 2."""


def kill_at(point: str) -> None:
    """Lets this process kill itself at a point of its run."""
    saves = 0

    def after(count: int, original: Callable[..., Any], *, chosen: Callable[..., bool] = lambda *_: True) -> Any:
        calls = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if saves >= 2 and chosen(*args):
                calls += 1
                if calls == count:
                    die()
            return original(*args, **kwargs)

        return call

    begin = train.checkpoint.Checkpointer._begin

    def counted(self: Any, temporary: Path) -> None:
        nonlocal saves
        saves += 1
        begin(self, temporary)

    train.checkpoint.Checkpointer._begin = counted  # type: ignore[method-assign]
    saving = train.checkpoint
    match point:
        case "during a step":
            saves = 2
            lean_zero.adamw_step = after(4, lean_zero.adamw_step)
        case "before the first file":
            TensorFile.__init__ = after(1, TensorFile.__init__)  # type: ignore[method-assign]
        case "inside a file":
            TensorFile.add = after(9, TensorFile.add)  # type: ignore[method-assign]
        case "before the state is written":
            saving._write_bytes = after(1, saving._write_bytes, chosen=lambda path, _: path.name == STATE_FILE)
        case "before the rename":
            saving.publish = after(1, saving.publish)
        case "after the rename":
            saving.superfluous = after(1, saving.superfluous)
        case "before an old one loses its name":
            saving.publish = after(2, saving.publish)
        case "while an old one is removed":
            saving.shutil = HalfRemoving  # type: ignore[assignment, attr-defined]


class HalfRemoving:
    """Stands for shutil: removes one file of a folder and dies."""

    @staticmethod
    def rmtree(folder: Path, **_: Any) -> None:
        next(path for path in sorted(folder.iterdir())).unlink()
        die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_in_child(config: TrainConfig, point: str | None) -> int:
    """Returns how a child that trains ends: 0, or the number of the signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            if point is not None:
                kill_at(point)
            with join_ranks() as ranks:
                train.trainer.train(config, ranks)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(options: str, folder: Path, points: list[str]) -> None:
    """Writes a line a point: the exit codes of the killed run and of the one after it."""
    given = json.loads(options)
    assert run_in_child(TrainConfig.of(**given, output=folder / "whole"), None) == 0
    for point in points:
        config = TrainConfig.of(**given, output=folder / point)
        codes = [run_in_child(config, point), run_in_child(config, None)]
        print(json.dumps([point, codes]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
