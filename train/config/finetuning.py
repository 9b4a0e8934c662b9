"""Where weights come from, and which of them are trained."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from shared.errors import InputError
from train.config.settings import require_at_least, require_positive

LORA_TARGETS = ("qkv", "proj", "q_linear", "kv_linear", "fc1", "fc2")
"""The linear layers of attention and MLP, in every block of every model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuningOptions:
    """Where the weights come from, and which of them are trained."""

    init_from: str | None = None
    """Begin with these weights: a run's folder (its average, if it has one), a file, a folder with model.safetensors
    and config.json, or either at Hugging Face, OWNER/NAME/FILE or OWNER/NAME."""
    reinit: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE ...")] = ()
    """With --init-from: modules that begin anew, e.g. x_embedder final_layer for another autoencoder."""
    freeze: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE ...")] = ()
    """Modules that are not trained, by the beginning of their parameters' names, e.g. y_embedder."""
    lora_rank: int | None = None
    """Train low-rank additions of this rank to linear layers of the blocks, and nothing else (needs peft)."""
    lora_alpha: float | None = None
    """The additions are scaled by this over their rank; the rank by default."""
    lora_targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = LORA_TARGETS
    """Names of the linear layers that get additions."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "lora_rank")
        require_positive(self, "lora_alpha")
        if self.reinit and self.init_from is None:
            raise InputError(f"reinit={' '.join(self.reinit)} does nothing without --init-from")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets != LORA_TARGETS):
            raise InputError("lora_alpha and lora_targets do nothing without --lora-rank")
        if self.lora_rank is not None:
            if self.init_from is None:
                raise InputError("lora_rank: additions to random weights learn nothing: use --init-from")
            if self.freeze or self.reinit:
                raise InputError("lora_rank trains its additions only: leave --freeze and --reinit out")
            unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
            if unknown or not self.lora_targets:
                raise InputError(f"lora_targets={' '.join(self.lora_targets)}: choose from {', '.join(LORA_TARGETS)}")
