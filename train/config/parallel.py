"""How the work is spread over devices, in what precision, and what is computed again to save memory."""

from dataclasses import dataclass
from typing import Literal

from shared.errors import InputError
from train.config.settings import MayChange, require_at_least, require_positive
from train.model.attention import AttentionBackend
from train.model.checkpointing import ActivationCheckpointing, Recomputation

Precision = Literal["bfloat16", "float32"]
Products = Literal["float8"]
Offload = Literal["none", "optimizer", "all"]
Checkpointing = ActivationCheckpointing | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelOptions:
    """How the work is spread over devices, in what precision, and what is computed again to save memory."""

    zero_stage: MayChange[Literal[0, 1, 2, 3]] = 2
    """What DeepSpeed shards: 0 nothing, 1 the optimiser's state, 2 gradients too, 3 weights too."""
    precision: Precision = "bfloat16"
    """Of weights, activations and gradients; the master weights are float32."""
    products: MayChange[Products | None] = None
    """float8: compute the products of blocks over tokens in 8 bits (e4m3, a scale a row), but for the gradients of
    weights, which stay bfloat16's; on GPUs from Ada and Hopper on. None: in the precision above."""
    cuda_graphs: MayChange[bool] = False
    """Record the forward and backward passes of each bucket, and launch them at once: faster where the thread that
    launches is the limit (small batches, slow hosts, products in 8 bits). On GPUs, at ZeRO stage 1 or 2. Each bucket is
    a graph, for which the driver keeps memory that --dry-run does not count."""
    sequence_parallel: MayChange[int] = 1
    """Neighbouring ranks that share the tokens of the same samples; it must divide the number of ranks."""
    offload: MayChange[Offload] = "none"
    """What lies in the CPU's memory: the optimiser's state, which is stepped there (stage 1 and up), or weights too
    (stage 3)."""
    attention_backend: MayChange[AttentionBackend | None] = None
    """The attention kernel; None chooses by device and shape among those that are installed."""
    activation_checkpointing: MayChange[Checkpointing] = "none"
    """What of the blocks is computed again in the backward pass: nothing, what is cheap to compute, all but attention
    to many tokens and the MLP's second product, or all; auto: as little as the device's memory allows, by the count of
    --dry-run."""
    checkpointed_blocks: MayChange[int | None] = None
    """How many blocks, from the first, do so; those after them keep more: with full what attention keeps, with
    attention what selective keeps, with selective everything. None: all do the same."""

    device_memory_gib: MayChange[float | None] = None
    """Memory of one device; what does not fit is refused. On a GPU, None is what it has."""

    @property
    def computed_in(self) -> str:
        """Precision and products, for people."""
        return self.precision if self.products is None else f"{self.precision} with products in {self.products}"

    @property
    def recomputation(self) -> Recomputation:
        """What the blocks compute again, once that is decided; see ``train.planning.fitting``."""
        assert self.activation_checkpointing != "auto"
        return Recomputation(mode=self.activation_checkpointing, blocks=self.checkpointed_blocks)

    def __post_init__(self) -> None:
        require_positive(self, "device_memory_gib")
        require_at_least(self, 1, "sequence_parallel", "checkpointed_blocks")
        if self.checkpointed_blocks is not None and self.activation_checkpointing in ("none", "auto"):
            raise InputError(
                f"checkpointed_blocks={self.checkpointed_blocks} does nothing with activation_checkpointing="
                f"{self.activation_checkpointing}: use selective, attention or full, or leave it out"
            )
        if self.products is not None and self.precision != "bfloat16":
            raise InputError(
                f"products={self.products} needs precision=bfloat16, found {self.precision}: leave one of them out"
            )
        if self.offload != "none" and self.zero_stage == 0:
            raise InputError(f"offload={self.offload} does nothing at zero_stage=0: use stage 1 or more")
        if self.cuda_graphs and (self.zero_stage not in (1, 2) or self.offload != "none"):
            raise InputError(
                f"cuda_graphs needs zero_stage 1 or 2 and no offload, found zero_stage={self.zero_stage}, offload="
                f"{self.offload}: leave it out"
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise InputError(f"offload=all needs zero_stage=3, found {self.zero_stage}: use it, or --offload optimizer")
