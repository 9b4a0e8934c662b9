"""Put before Python's path, stops a worker at a phase of a commit and leaves it there to be killed.

The folder that a variable names holds a file ``phase``. The first process that comes to it writes its number into
``reached`` and sleeps for as long as that phase is wanted; each shard that begins to be encoded is a line in ``begun``.
Nothing of the product knows of this.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "LATENTMILL_TEST_PAUSES"


def pause(phase: str) -> None:
    """Sleeps here if this is the phase, and nobody came before."""
    folder = Path(os.environ[FOLDER])

    def is_wanted() -> bool:
        try:
            return (folder / "phase").read_text() == phase
        except FileNotFoundError:
            return False

    if not is_wanted():
        return
    try:
        with open(folder / "reached", "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    while is_wanted():
        time.sleep(0.05)


def pause_commits(commit: ModuleType) -> None:
    """Puts the phases into ``shared.cache.commit``."""
    commit_rows, whole = commit.commit_rows, commit.ShardWriter.commit

    def with_phases(*arguments: Any) -> bool:
        pause("after the shard, before its fragment")
        created: bool = commit_rows(*arguments)
        pause("after the fragment")
        return created

    class File:
        def __init__(self, file: Any) -> None:
            self._file = file

        def publish(self, name: str) -> None:
            pause("before the shard is durable")
            self._file.publish(name)

    def paused(self: Any) -> Any:
        self._file = File(self._file)
        return whole(self)

    commit.commit_rows, commit.ShardWriter.commit = with_phases, paused  # type: ignore[attr-defined]


def note_encoding(encode: ModuleType) -> None:
    """Lets ``preprocess.encode`` say what it begins."""
    encode_shard = encode.ShardEncoder.encode_shard

    def noted(self: Any, store: Any, task: Any, *others: Any, **more: Any) -> Any:
        with open(Path(os.environ[FOLDER]) / "begun", "a") as file:
            file.write(f"{task.shard_id} {time.time_ns()}\n")
        return encode_shard(self, store, task, *others, **more)

    encode.ShardEncoder.encode_shard = noted  # type: ignore[attr-defined]


CHANGES = {"shared.cache.commit": pause_commits, "preprocess.encode": note_encoding}


class Finder(importlib.abc.MetaPathFinder):
    """Changes modules when they are loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            change(module)

        loader.exec_module = exec_module
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder())
