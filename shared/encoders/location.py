"""Finding a model's files."""

import os
from pathlib import Path

from shared.errors import InputError

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_DEMO_MODELS = ("t5", "vae")
_CONFIG = "config.json"
_HUB_SECONDS = 10.0


def locate(model: str) -> str:
    """Returns what transformers and diffusers load: a folder, or a hub id such as ``stabilityai/sd-vae-ft-ema``.

    ``demo:t5`` and ``demo:vae`` are the small models inside this package.

    Raises:
        InputError: if ``model`` looks like a path and there is no such folder, or no such model in this package.
    """
    if model.startswith(DEMO_PREFIX):
        name = model.removeprefix(DEMO_PREFIX)
        if name not in _DEMO_MODELS:
            raise InputError(
                f"model {model!r}: expected {' or '.join(f'{DEMO_PREFIX}{each}' for each in _DEMO_MODELS)}"
            )
        return str(_DEMO_FOLDER / name)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"model {model!r}: no such folder: expected a folder or a hub id like 'owner/name'")
    return model


def model_folder(model: str) -> Path | None:
    """Returns the folder in which a model's files lie on this machine; None for a hub id that is not there yet."""
    from huggingface_hub import hf_hub_download  # slow, and not needed by --help

    try:
        place = locate(model)
        if Path(place).is_dir():
            return Path(place)
        return Path(hf_hub_download(place, _CONFIG, local_files_only=True)).parent
    except (InputError, OSError, ValueError):  # whoever loads it says so
        return None


def require_model(model: str, *, option: str, is_here: bool = True) -> None:
    """Checks that there is a model, before anything waits for it. Nothing is downloaded.

    A hub that does not answer, or is not to be asked, says nothing: whoever loads the model does.

    Args:
        model: Hub id, folder, or one of this package.
        option: By which the user named it.
        is_here: Whether it is loaded on this machine: else a folder that is not here may be where it is.

    Raises:
        InputError: if there is none.
    """
    try:
        place = locate(model)
    except InputError as error:
        if not is_here and Path(model).expanduser().is_absolute():
            return
        raise InputError(f"{option}: {error}") from None
    if not Path(place).is_dir():
        _require_on_hub(place, option)
    elif not (Path(place) / _CONFIG).is_file():
        raise InputError(f"{option} {model}: found no {_CONFIG} in this folder: expected a model's")


def _require_on_hub(name: str, option: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # slow, and not needed by --help
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    from shared.media.hub import LIBRARY_ERRORS

    if model_folder(name) is not None:
        return
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        get_hf_file_metadata(hf_hub_url(name, _CONFIG, endpoint=endpoint), timeout=_HUB_SECONDS, endpoint=endpoint)
    except HFValidationError as error:
        raise InputError(f"{option} {name}: neither a folder here nor the name of a hub's model ({error})") from None
    except GatedRepoError:
        raise InputError(
            f"{option} {name}: its owner lets only some have it: ask for that on its page, and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{option} {name}: no folder here, and the hub has no such model that it would show: check the name; for a "
            "private one set HF_TOKEN"
        ) from None
    except EntryNotFoundError:
        raise InputError(f"{option} {name}: the hub has no {_CONFIG} of it: expected a model in their format") from None
    except LIBRARY_ERRORS:
        return
