"""The model of a run: built, begun with weights that are there, and told what of it is trained."""

from pathlib import Path

import torch
from torch import nn

import train.model
from shared.cache.dataset import Provenance
from shared.errors import InputError
from train.checkpoint_files import EMA_FILE, list_checkpoints
from train.config import FinetuningOptions, TrainConfig
from train.lora import add_lora
from train.model.config import ModelConfig
from train.model.float8 import compute_in_float8
from train.model.published import LoadReport, load_state, load_weights
from train.model.transformer import DiffusionTransformer
from train.model.weight_files import WeightFile
from train.run_folder import RUN_FILE, read_run
from train.run_weights import read_run_weights, weights_file
from train.sample_index import LATENT, TEXT

_READS = {LATENT: ("x_embedder", "final_layer"), TEXT: ("y_embedder",)}
"""Modules that read or write what a stream's encoder makes."""


def build_model(config: ModelConfig, options: TrainConfig) -> DiffusionTransformer:
    """Returns a run's model, newly initialised, on the device that is PyTorch's default.

    Args:
        config: The architecture.
        options: Which attention kernel, what is computed in 8 bits, what again, what is trained.

    Raises:
        InputError: if a module that is not to be trained is not there, or blocks that are to be checkpointed are not.
    """
    recomputation = options.parallel.recomputation
    model = train.model.build_model(
        config,
        attention_backend=options.parallel.attention_backend,
        activation_checkpointing=recomputation.mode,
        checkpointed_blocks=recomputation.blocks,
    )
    if options.parallel.products == "float8":
        compute_in_float8(model)
    _choose_trained(model, options.finetuning)
    return model


def begin_with(model: DiffusionTransformer, options: FinetuningOptions, provenance: Provenance) -> LoadReport:
    """Loads the weights that a run begins with. Additions of low rank stay as they were made.

    Args:
        model: On the CPU.
        options: With ``init_from``.
        provenance: Of the samples that are trained on: a run's weights must be for the same encoders.

    Raises:
        InputError: if they cannot be read, or are for another model or other encoders.
    """
    assert options.init_from is not None
    plain = _without_additions(model) if options.lora_rank is not None else model
    folder = Path(options.init_from)
    if not (folder / RUN_FILE).is_file():
        return load_weights(plain, options.init_from, reinit=options.reinit)
    description = read_run(folder)
    _require_same_encoders(folder, description.provenance, provenance, options.reinit)
    newest = list_checkpoints(folder)
    averaged = bool(newest) and (newest[-1] / EMA_FILE).is_file()
    weights = read_run_weights(description, weights_file(folder, None, "ema" if averaged else "plain"))
    file = WeightFile(source=str(weights.file), tensors=weights.plain(), config=None)
    return load_state(plain, file, reinit=options.reinit)


def _choose_trained(model: DiffusionTransformer, options: FinetuningOptions) -> None:
    if options.lora_rank is not None:
        add_lora(model, options)
    for module in options.freeze:
        frozen = [p for name, p in model.named_parameters() if name.startswith(f"{module}.")]
        if not frozen:
            modules = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
            raise InputError(f"freeze={module}: the model has no such module: choose from {', '.join(modules)}")
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"freeze={' '.join(options.freeze)}: nothing is left to train: name fewer modules")


def _without_additions(model: DiffusionTransformer) -> DiffusionTransformer:
    """Returns a model of the same architecture whose weights are ``model``'s own, under their plain names."""
    with torch.device("meta"):
        plain = train.model.build_model(model.config)
    shared = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    for name in [name for name, _ in plain.named_parameters()]:
        path, _, last = name.rpartition(".")
        owner: nn.Module = plain.get_submodule(path)
        setattr(owner, last, shared[name])
    for name in [name for name, _ in plain.named_buffers()]:
        path, _, last = name.rpartition(".")
        setattr(plain.get_submodule(path), last, model.get_buffer(name))
    return plain


def _require_same_encoders(folder: Path, theirs: Provenance, ours: Provenance, reinit: tuple[str, ...]) -> None:
    for stream, modules in _READS.items():
        for key in ("weights_sha256", "scaling_factor", "shift_factor"):
            recorded, found = (side[stream].get(key) for side in (theirs, ours))
            if recorded != found and not set(modules) <= set(reinit):
                raise InputError(
                    f"--init-from {folder}: it was trained on {stream} of {key}={recorded}, this data has "
                    f"{key}={found}: use data of its encoders, or begin anew what reads them: --reinit "
                    f"{' '.join(modules)}"
                )
