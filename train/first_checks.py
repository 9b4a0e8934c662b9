"""What can be told of a run's options before a cache, a manifest or a model is opened."""

from pathlib import Path

from shared.encoders.location import require_model
from shared.errors import InputError
from train.checkpoint_files import list_checkpoints
from train.config import TrainConfig
from train.model.weight_files import require_there
from train.run_folder import RUN_FILE, read_run, require_own_folder, require_same_options
from train.sampling.prompts import read_prompts


def check_first(config: TrainConfig) -> None:
    """Looks for the files that options name, and at the options of the run in the output folder. One rank does it.

    Raises:
        InputError: if a file is missing or not what it should be, or the run in the folder has other options.
    """
    if not config.dry_run:
        require_own_folder(config.output)
        require_same_options(config.output, config.to_json())
        _require_told_end(config)
    if config.evaluation.preview_prompts is not None:
        read_prompts(config.evaluation.preview_prompts)
    for option in ("vae", "text_encoder") if config.encoding.online is not None else ():
        require_model(getattr(config.encoding, option), option=f"--{option.replace('_', '-')}")
    begins_with = config.finetuning.init_from
    if begins_with is not None and not list_checkpoints(config.output) and not (Path(begins_with) / RUN_FILE).is_file():
        require_there(begins_with)


def _require_told_end(config: TrainConfig) -> None:
    """Raises :class:`InputError` if other --steps would move the end of a run's falling learning rate by the way."""
    if config.optimiser.lr_schedule == "constant" or config.optimiser.decay_steps is not None:
        return
    theirs = read_run(config.output).config if (config.output / RUN_FILE).exists() else {}
    ends = theirs.get("decay_steps")
    if theirs.get("lr_schedule") == config.optimiser.lr_schedule and ends not in (None, config.steps):
        raise InputError(
            f"{config.output}: the learning rate of the run there falls until step {ends}, and steps={config.steps} "
            f"would move that: give --decay-steps {ends} to keep it, or --decay-steps {config.steps}"
        )
