"""How the work is spread over devices, in what precision, and what is computed again to save memory."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import InputError
from train.config.settings import MayChange
from train.model.attention import AttentionBackend
from train.model.checkpointing import ActivationCheckpointing

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """How the work is spread over devices, in what precision, and what is computed again to save memory."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards: 0 nothing (float32 only), 1 the optimiser's state, 2 gradients too, 3 weights too."""
    precision: Precision = "bfloat16"
    """Of weights, activations and gradients; the master weights are float32."""
    attention_backend: MayChange[AttentionBackend | None] = None
    """The attention kernel; None chooses by device and shape."""
    activation_checkpointing: MayChange[ActivationCheckpointing] = "none"
    """What of the blocks is computed again in the backward pass: nothing, what is cheap to compute, or all."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0 and self.precision == "bfloat16":
            raise InputError("zero_stage=0 keeps no float32 master weights in bfloat16: use stage 1, or float32")
