"""What can be told of a run's options before a cache, a manifest or a model is opened."""

from pathlib import Path

from train.checkpoint_files import list_checkpoints
from train.config import TrainConfig
from train.model.weight_files import require_there
from train.run_folder import RUN_FILE, require_own_folder, require_same_options
from train.sampling.prompts import read_prompts


def check_first(config: TrainConfig) -> None:
    """Looks for the files that options name, and at the options of the run in the output folder. One rank does it.

    Raises:
        InputError: if a file is missing or not what it should be, or the run in the folder has other options.
    """
    if not config.dry_run:
        require_own_folder(config.output)
        require_same_options(config.output, config.to_json())
    if config.evaluation.preview_prompts is not None:
        read_prompts(config.evaluation.preview_prompts)
    begins_with = config.finetuning.init_from
    if begins_with is not None and not list_checkpoints(config.output) and not (Path(begins_with) / RUN_FILE).is_file():
        require_there(begins_with)
