"""Finding a model's files."""

from pathlib import Path

from shared.errors import InputError

DEMO_PREFIX = "demo:"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_DEMO_MODELS = ("t5", "vae")


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
        return Path(hf_hub_download(place, "config.json", local_files_only=True)).parent
    except (InputError, OSError, ValueError):  # whoever loads it says so
        return None
