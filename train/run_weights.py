"""The weights of a run, as the plain model has them: of a checkpoint, averaged or not, additions merged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import InputError
from train.checkpoint_files import EMA_FILE, WEIGHTS_FILE, list_checkpoints
from train.config import DEFAULTS, FinetuningOptions
from train.config.files import value_from_json
from train.lora import has_lora, merged_state, scale_of
from train.model import create_model
from train.model.transformer import DiffusionTransformer
from train.run_folder import RUN_FILE, RunDescription

Which = Literal["ema", "plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunWeights:
    """What a checkpoint holds."""

    file: Path
    state: dict[str, Tensor]
    """As it is trained, float32."""
    finetuning: FinetuningOptions

    def plain(self) -> dict[str, Tensor]:
        """Returns the weights of the model without additions."""
        return merged_state(self.state, scale_of(self.finetuning)) if has_lora(self.state) else self.state


def weights_file(run: Path, checkpoint: Path | None, which: Which, *, otherwise: str = "--weights plain") -> Path:
    """Returns the file of a run's weights.

    Args:
        run: The run's folder.
        checkpoint: None: the newest.
        which: The average or the weights themselves.
        otherwise: The option that takes the weights themselves, for the message.

    Raises:
        InputError: if there is none, or the checkpoint is another run's.
    """
    own = None if checkpoint is None else checkpoint / RUN_FILE
    if own is not None and own.is_file() and own.read_bytes() != (run / RUN_FILE).read_bytes():
        raise InputError(f"{checkpoint}: a checkpoint of another run than {run}: name its own run's folder")
    if checkpoint is None:
        complete = list_checkpoints(run)
        if not complete:
            raise InputError(f"{run}: the run has no checkpoint yet: train it further")
        checkpoint = complete[-1]
    file = checkpoint / (EMA_FILE if which == "ema" else WEIGHTS_FILE)
    if not file.is_file():
        hint = f", or {otherwise}" if which == "ema" else ""
        raise InputError(f"{file}: no such file: expected a checkpoint of this run{hint}")
    return file


def read_run_weights(description: RunDescription, file: Path) -> RunWeights:
    """Returns the weights of a checkpoint's file.

    Raises:
        InputError: if it is damaged.
    """
    names = FinetuningOptions.__dataclass_fields__
    options: dict[str, Any] = DEFAULTS | description.config
    finetuning = FinetuningOptions(**{name: value_from_json(name, options[name]) for name in names})
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: cannot be read ({' '.join(str(error).split())}): choose another of the run's checkpoints"
        ) from None
    return RunWeights(file=file, state=state, finetuning=finetuning)


def load_run_model(description: RunDescription, file: Path) -> DiffusionTransformer:
    """Returns a run's model with the weights of a checkpoint's file, float32, in evaluation mode.

    Raises:
        InputError: if they are another model's.
    """
    model = create_model((DEFAULTS | description.config)["model"], **description.model_config)
    try:
        model.load_state_dict(read_run_weights(description, file).plain())
    except RuntimeError as error:
        raise InputError(f"{file}: weights of another model ({' '.join(str(error).split())})") from None
    return model.eval()
