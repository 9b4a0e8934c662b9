"""A run's folder: what is being trained, on what, and where its checkpoints and metrics lie.

``run.json`` is written before the first step. A run that is started again in the folder must agree with it, but for
what decides nothing that is learnt, and for the learning rate and its schedule, whose new values it then has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.stores.files import durable_file, explained, make_folder, publish, temporary_path
from train.checkpoint_files import list_checkpoints
from train.config import ADJUSTABLES, DEFAULTS, FREE_TO_CHANGE
from train.model.config import ModelConfig

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PROBES_FOLDER = "probes"
"""What is known of a manifest's clips, where they are encoded online."""
_OF_THE_BEGINNING = frozenset({"init_from", "reinit"})
"""Options that nothing reads once there is a checkpoint, so that those weights may be moved or removed."""
_Pair = tuple[str, Any, Any]
"""A name, and the values of the run that is there and of the one to come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDescription:
    """What determines a run. All of it is JSON."""

    config: dict[str, Any]
    """The trainer's configuration."""
    model_config: dict[str, Any]
    """The model's, resolved."""
    provenance: dict[str, dict[str, Any]]
    """The cache's, by stream: which encoders belong to the model."""
    buckets: dict[str, dict[str, Any]]
    """By bucket: ``samples``, ``fps``."""
    samples_sha256: str
    """Of the identities of the cache's samples."""


def write_durably(path: Path, data: bytes) -> None:
    """Puts ``data`` in the place of whatever ``path`` holds, in one step."""
    temporary = temporary_path(path.parent)
    with durable_file(temporary) as file:
        file.write(data)
    publish(temporary, path)


def read_run(folder: Path) -> RunDescription:
    """Returns the description of the run in a folder.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        raise InputError(f"{folder}: found no {RUN_FILE}: expected the output folder of a training run")
    try:
        return RunDescription(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: not the description of a run ({error})") from None


def require_same_run(folder: Path, description: RunDescription) -> None:
    """Checks that a folder holds no other run, and nothing else.

    Raises:
        InputError: if it does, naming both values.
    """
    if (folder / RUN_FILE).exists():
        _require_same(folder, read_run(folder), description)
    require_own_folder(folder)


def open_run(folder: Path, description: RunDescription) -> list[str]:
    """Writes the description into a new run's folder, or checks that the run there is the same.

    Returns:
        What is adjusted of the run there, each with both values. They are recorded.
    Raises:
        InputError: if the folder holds another run, naming both values, or something else.
    """
    require_same_run(folder, description)
    adjusted: list[_Pair] = []
    if (folder / RUN_FILE).exists():
        theirs = read_run(folder)
        pairs = _option_pairs(theirs, description.config, ADJUSTABLES)
        adjusted = [(name, before, after) for name, before, after in pairs if before != after]
        if not adjusted:
            return []
        description = replace(theirs, config=theirs.config | {name: after for name, _, after in adjusted})
    with explained("making the run's folder", folder=folder):
        make_folder(folder)
    write_durably(folder / RUN_FILE, (json.dumps(asdict(description), indent=2) + "\n").encode())
    return [f"{name}={after} (before: {before})" for name, before, after in adjusted]


def require_same_options(folder: Path, options: Mapping[str, Any], *, exactly: bool = False) -> None:
    """Checks that the run of a folder, if there is one, has the same options.

    Args:
        folder: A run's, or one that a run is to get.
        options: Of a run, as JSON, by name.
        exactly: Those that may be adjusted too.

    Raises:
        InputError: if some are others, naming all of them with both values.
    """
    if (folder / RUN_FILE).exists():
        theirs = read_run(folder)
        compared = _fixed(folder, options) | (ADJUSTABLES if exactly else frozenset())
        _refuse(folder, theirs, options, _option_pairs(theirs, options, compared))


def require_own_folder(folder: Path) -> None:
    """Raises :class:`InputError` if a folder holds something else than a run, or what is kept for one to come."""
    if (folder / RUN_FILE).exists() or not folder.exists():
        return
    if not folder.is_dir() or any(entry.name != PROBES_FOLDER for entry in folder.iterdir()):
        raise InputError(f"{folder}: found files but no {RUN_FILE}: expected a new or empty folder, or a run's")


def _require_same(folder: Path, theirs: RunDescription, ours: RunDescription) -> None:
    _refuse(folder, theirs, ours.config, _option_pairs(theirs, ours.config, _fixed(folder, ours.config)))
    pairs: list[_Pair] = [(name, theirs.model_config.get(name), value) for name, value in ours.model_config.items()]
    for stream, settings in ours.provenance.items():
        recorded = theirs.provenance.get(stream, {})
        pairs += [
            (f"{stream} {name}", recorded.get(name), value) for name, value in settings.items() if name != "model"
        ]
    pairs.append(("samples_sha256", theirs.samples_sha256, ours.samples_sha256))
    _refuse(folder, theirs, ours.config, pairs)


def _fixed(folder: Path, options: Mapping[str, Any]) -> frozenset[str]:
    """Returns the names of options that the run of a folder goes on with as they were."""
    free = FREE_TO_CHANGE | ADJUSTABLES | (_OF_THE_BEGINNING if list_checkpoints(folder) else frozenset())
    return frozenset(options) - free


def _option_pairs(theirs: RunDescription, ours: Mapping[str, Any], names: frozenset[str]) -> list[_Pair]:
    return [(name, theirs.config.get(name, DEFAULTS.get(name)), value) for name, value in ours.items() if name in names]


def _refuse(folder: Path, theirs: RunDescription, ours: Mapping[str, Any], pairs: Sequence[_Pair]) -> None:
    """Raises :class:`InputError` if a name has two values, naming all of these."""
    differing = [(name, recorded, value) for name, recorded, value in pairs if recorded != value]
    if differing:
        recorded, found = (", ".join(f"{pair[0]}={pair[side]}" for pair in differing) for side in (1, 2))
        raise InputError(
            f"{folder}: the run there has {recorded} (cache {theirs.config['cache']}), this one has {found} "
            f"(cache {ours['cache']}): use the run's own settings or another --output"
        )


def jsonable(config: ModelConfig) -> dict[str, Any]:
    """Returns a model's configuration as JSON gives it back: with lists for tuples."""
    result: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return result
