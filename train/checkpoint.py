"""Checkpoints: complete or absent, and the same for any number of ranks and any ZeRO stage.

A checkpoint is written under a temporary name, made durable and renamed, so what has the name ``step-00000100`` is
whole. Older ones go only after that: each is renamed first, so a name is never given to half of one.

All of it is safetensors and JSON, by parameter and in float32: weights, their average, the optimiser's moments. Nothing
is pickled, and nothing depends on how DeepSpeed cut it: a run goes on with other ranks or another stage, and each
process reads its own part. One parameter at a time is put together, and the files are written by different ranks.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shared.errors import InputError
from shared.stores.files import TEMPORARY_PREFIX, durable_file, explained, make_folder, publish, sync_folder
from shared.stores.store import StoreError
from train.checkpoint_files import (
    EMA_FILE,
    FOLDER,
    FORMAT,
    OPTIMISER_FILE,
    RANDOM_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    checkpoint_name,
    list_checkpoints,
    read_state,
    require_intact,
    superfluous,
)
from train.ema import Ema
from train.parallel.master_weights import MOMENTS, MasterWeights
from train.parallel.ranks import Ranks
from train.run_folder import RUN_FILE
from train.tensor_file import FileRecord, TensorFile


class Checkpointer:
    """Saves and restores one run.

    Args:
        run: The run's folder.
        masters: The engine's weights and moments.
        model: The module inside the engine, for what it has beside parameters.
        ema: The average of the weights, if there is one.
        ranks: All of them call every method.
        keep: Newest checkpoints to keep.
        keep_every: Keep those after a multiple of so many steps as well.
    """

    def __init__(
        self,
        run: Path,
        *,
        masters: MasterWeights,
        model: nn.Module,
        ema: Ema | None,
        ranks: Ranks,
        keep: int,
        keep_every: int | None,
    ) -> None:
        self._run, self._masters, self._model, self._ema = run, masters, model, ema
        self._ranks, self._keep, self._keep_every = ranks, keep, keep_every

    def save(self, step: int) -> Path:
        """Saves the state after ``step`` steps, then removes what is not to be kept.

        Raises:
            StoreError: if it cannot be written, on rank 0; the others end. Older checkpoints stay as they are.
        """
        final = self._run / FOLDER / checkpoint_name(step)
        temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
        try:
            self._ranks.agree(lambda: self._begin(temporary) if self._ranks.is_first else None)
            self._ranks.agree(lambda: _require_folder(temporary))
            files = self._write_files(temporary)
            self._ranks.agree(lambda: self._finish(temporary, step, files) if self._ranks.is_first else None)
        except InputError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._ranks.agree(lambda: self._publish(temporary, final) if self._ranks.is_first else None)
        return final

    def newest_name(self) -> str | None:
        """Returns the name of the newest complete checkpoint."""
        checkpoints = list_checkpoints(self._run)
        return checkpoints[-1].name if checkpoints else None

    def restore_newest(self) -> int:
        """Restores the newest checkpoint and returns its step; 0 if there is none.

        Raises:
            InputError: if it is damaged, or not of this model.
        """
        checkpoints = self._ranks.from_first(list_checkpoints(self._run) if self._ranks.is_first else [])
        if not checkpoints:
            return 0
        newest = checkpoints[-1]
        state = self._ranks.agree(lambda: self._checked(newest))
        self._ranks.agree(lambda: self._require_same_model(newest))  # of files that the ranks found intact
        for name, parts in self._sharded_files().items():
            self._read(newest / name, parts)
        self._masters.set_steps(state["optimizer_steps"])
        self._masters.put_into_model(self._masters.parts())
        self._restore_untrained(newest / WEIGHTS_FILE)
        self._restore_random(newest / RANDOM_FILE, state)
        return int(state["step"])

    def _sharded_files(self) -> dict[str, dict[str, Mapping[str, Tensor]]]:
        """Returns by file, and there by the names' prefix, this rank's parts."""
        files: dict[str, dict[str, Mapping[str, Tensor]]] = {WEIGHTS_FILE: {"": self._masters.parts()}}
        if self._ema is not None:
            files[EMA_FILE] = {"": self._ema.parts}
        files[OPTIMISER_FILE] = {f"{key}/": self._masters.moments(key) for key in MOMENTS}
        return files

    def _begin(self, temporary: Path) -> None:
        folder = temporary.parent
        with explained("beginning a checkpoint", folder=folder):
            make_folder(folder)
            for entry in folder.iterdir():
                if entry.name.startswith(TEMPORARY_PREFIX):  # of a process that was killed
                    shutil.rmtree(entry)
            temporary.mkdir()

    def _publish(self, temporary: Path, final: Path) -> None:
        publish(temporary, final)
        for old in superfluous(list_checkpoints(self._run), newest=self._keep, every=self._keep_every):
            _remove(old)

    def _write_files(self, folder: Path) -> dict[str, FileRecord]:
        """Writes all tensors, and returns what each file holds. All ranks put together, one rank a file writes."""
        mine: dict[str, FileRecord] = {}
        failure: InputError | None = None
        for number, (name, parts) in enumerate(self._sharded_files().items()):
            writer = number % self._ranks.world_size
            tensors = self._whole_tensors(parts, writer, with_model=name != OPTIMISER_FILE)
            if self._ranks.rank != writer:
                for _ in tensors:
                    pass
                continue
            try:
                mine[name] = _write(folder / name, self._shapes(parts, with_model=name != OPTIMISER_FILE), tensors)
            except StoreError as error:
                failure = failure or error
                for _ in tensors:  # the others wait for this rank's parts
                    pass
        random = self._ranks.gather(_random_state(self._ranks.device))
        if self._ranks.is_first:
            states = {f"{rank}/{kind}": value for rank, state in enumerate(random) for kind, value in state.items()}
            try:
                mine[RANDOM_FILE] = _write_bytes(folder / RANDOM_FILE, save(states))
            except StoreError as error:
                failure = failure or error

        def complete() -> None:
            if failure is not None:
                raise failure

        self._ranks.agree(complete)
        return {name: record for records in self._ranks.gather(mine) for name, record in records.items()}

    def _whole_tensors(
        self, parts: Mapping[str, Mapping[str, Tensor]], writer: int, *, with_model: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields whole tensors on the writer's CPU, nothing elsewhere. All ranks run through it."""
        trained = set(self._masters.trained)
        for prefix, values in parts.items():
            for name in self._masters.shapes if with_model else self._masters.trained:
                whole = self._masters.gather(values if name in trained else {}, name, to=writer)
                if whole is not None:
                    yield prefix + name, whole
        if with_model and self._ranks.rank == writer:
            for name, buffer in self._buffers().items():
                yield name, buffer.detach().to("cpu", torch.float32, copy=True)

    def _shapes(self, parts: Mapping[str, Mapping[str, Tensor]], *, with_model: bool) -> dict[str, torch.Size]:
        shapes = self._masters.shapes
        if with_model:
            return shapes | {name: buffer.shape for name, buffer in self._buffers().items()}
        return {prefix + name: shapes[name] for prefix in parts for name in self._masters.trained}

    def _buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that belong to the model's state."""
        kept = self._model.state_dict().keys()
        return {name: buffer for name, buffer in self._model.named_buffers() if name in kept}

    def _finish(self, folder: Path, step: int, files: Mapping[str, FileRecord]) -> None:
        """Writes what makes the folder a checkpoint."""
        files = dict(files)
        if (self._run / RUN_FILE).is_file():
            files[RUN_FILE] = _write_bytes(folder / RUN_FILE, (self._run / RUN_FILE).read_bytes())
        state = {
            "format": FORMAT,
            "step": step,
            "optimizer_steps": self._masters.steps(),
            "num_ranks": self._ranks.world_size,
            "files": {name: asdict(record) for name, record in files.items()},
        }
        _write_bytes(folder / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())
        sync_folder(folder)

    def _checked(self, checkpoint: Path) -> dict[str, Any]:
        """Returns a checkpoint's state; the ranks check its files in turn."""
        state = read_state(checkpoint)
        names = sorted(state["files"])
        for name in self._sharded_files():
            if name not in names:
                raise InputError(f"{checkpoint}: found no {name} there: was it saved by a run with other settings?")
        require_intact(checkpoint, names[self._ranks.rank :: self._ranks.world_size])
        return state

    def _require_same_model(self, checkpoint: Path) -> None:
        with safe_open(checkpoint / WEIGHTS_FILE, "pt") as file:
            for name, shape in self._masters.shapes.items():
                found = tuple(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118
                if found != tuple(shape):
                    raise InputError(
                        f"{checkpoint / WEIGHTS_FILE}: found {name} of shape {found}, expected {tuple(shape)}: "
                        "the weights of another model"
                    )

    def _read(self, path: Path, by_prefix: Mapping[str, Mapping[str, Tensor]]) -> None:
        with safe_open(path, "pt") as file:
            for prefix, parts in by_prefix.items():
                for name in parts:
                    self._masters.fill(parts, name, file.get_tensor(prefix + name))

    def _restore_untrained(self, path: Path) -> None:
        trained = set(self._masters.trained)
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in self._masters.shapes:
                if name not in trained:
                    self._masters.set_weight(name, file.get_tensor(name))
            for name, buffer in self._buffers().items():
                buffer.copy_(file.get_tensor(name))

    def _restore_random(self, path: Path, state: dict[str, Any]) -> None:
        """Restores this rank's generators; among another number of ranks they start anew from the step."""
        if state["num_ranks"] != self._ranks.world_size:
            torch.manual_seed(state["step"] * self._ranks.world_size + self._ranks.rank)
            return
        saved, rank = load_file(path), self._ranks.rank
        torch.set_rng_state(saved[f"{rank}/cpu"])
        if f"{rank}/cuda" in saved and self._ranks.device.type == "cuda":
            torch.cuda.set_rng_state(saved[f"{rank}/cuda"], self._ranks.device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _write(path: Path, shapes: Mapping[str, torch.Size], tensors: Iterator[tuple[str, Tensor]]) -> FileRecord:
    file = TensorFile(path, shapes)
    try:
        for name, tensor in tensors:
            file.add(name, tensor)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


def _write_bytes(path: Path, data: bytes) -> FileRecord:
    with durable_file(path) as file:
        file.write(data)
    return FileRecord.of(path)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: rank 0 made this folder and not every rank sees it: use an --output that all share"
        )


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint: its name first, so that nothing half-removed has it."""
    doomed = checkpoint.with_name(f"{TEMPORARY_PREFIX}old-{checkpoint.name}")
    publish(checkpoint, doomed)
    with explained(f"removing {doomed.name}", folder=doomed.parent):
        shutil.rmtree(doomed)
