"""Checkpoints: complete or absent.

One is written under a temporary name by all ranks, made durable, and renamed when every rank is done, so what has the
name ``step-00000100`` is whole. Older ones go only after that. The weights and their average are safetensors, for
anyone; DeepSpeed's files beside them hold the optimiser's state and are pickles: they are loaded from the run's own
folder only, so a run's folder from elsewhere must be trusted like a program.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import InputError
from shared.stores.files import TEMPORARY_PREFIX, publish
from train.checkpoint_files import EMA_FILE, FOLDER, STATE_FILE, WEIGHTS_FILE, list_checkpoints, read_state
from train.ema import Ema
from train.parallel.ranks import Ranks
from train.parallel.zero import MasterWeights, gather_sharded_weights

_DEEPSPEED_TAG = "deepspeed"


class Checkpointer:
    """Saves and restores one run.

    Args:
        run: The run's folder.
        engine: DeepSpeed's.
        model: The module inside the engine.
        ema: The average of the weights, if there is one.
        ranks: All of them call every method.
        keep: Newest checkpoints to keep.
    """

    def __init__(self, run: Path, *, engine: Any, model: nn.Module, ema: Ema | None, ranks: Ranks, keep: int) -> None:
        self._run, self._engine, self._model, self._ema = run, engine, model, ema
        self._ranks, self._keep = ranks, keep

    def save(self, step: int) -> Path:
        """Saves the state after ``step`` steps, then removes what is too old."""
        final = self._run / FOLDER / f"step-{step:08d}"
        temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
        if self._ranks.is_first:
            self._remove_leftovers()
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        self._engine.save_checkpoint(str(temporary), tag=_DEEPSPEED_TAG, save_latest=False)
        weights = self._gather_weights()
        averages = self._ema.gather() if self._ema is not None else {}
        if self._ranks.is_first:
            save_file(weights, temporary / WEIGHTS_FILE)
            if averages:
                save_file(self._with_buffers(averages), temporary / EMA_FILE)
            state = {"step": step, "world_size": self._ranks.world_size}
            (temporary / STATE_FILE).write_text(json.dumps(state) + "\n")
        self._ranks.barrier()  # from here on the folder's content stands still
        _sync_files(temporary)
        self._ranks.barrier()
        if self._ranks.is_first:
            publish(temporary, final)
            for old in list_checkpoints(self._run)[: -self._keep]:
                shutil.rmtree(old)
        self._ranks.barrier()
        return final

    def newest_name(self) -> str | None:
        """Returns the name of the newest complete checkpoint."""
        checkpoints = list_checkpoints(self._run)
        return checkpoints[-1].name if checkpoints else None

    def restore_newest(self) -> int:
        """Restores the newest checkpoint and returns its step; 0 if there is none.

        Raises:
            InputError: if it was saved by another number of ranks.
        """
        checkpoints = list_checkpoints(self._run)
        if not checkpoints:
            return 0
        state = read_state(checkpoints[-1])
        if state["world_size"] != self._ranks.world_size:
            raise InputError(
                f"{checkpoints[-1]}: saved by {state['world_size']} ranks, this run has {self._ranks.world_size}: "
                f"go on with {state['world_size']}"
            )
        self._engine.load_checkpoint(str(checkpoints[-1]), tag=_DEEPSPEED_TAG)
        if self._ema is not None:
            self._ema.load(load_file(checkpoints[-1] / EMA_FILE))
        return int(state["step"])

    def _gather_weights(self) -> dict[str, Tensor]:
        if self._engine.zero_optimization_stage() == 3:
            weights = gather_sharded_weights(self._model)
        else:
            masters = MasterWeights(self._model)
            weights = masters.gather(masters.parts())
        return self._with_buffers(weights) if self._ranks.is_first else {}

    def _with_buffers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        buffers = dict(self._model.named_buffers())
        return weights | {name: buffer.to("cpu", torch.float32, copy=True) for name, buffer in buffers.items()}

    def _remove_leftovers(self) -> None:
        folder = self._run / FOLDER
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.name.startswith(TEMPORARY_PREFIX):
                shutil.rmtree(entry)


def _sync_files(folder: Path) -> None:
    """Makes every file below a folder durable, and the folders."""
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
