"""What a worker tells the driver. Free of torch, which the driver does not load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from preprocess.timeline import Interval
from shared.cache.dataset import CommittedShard, Provenance
from shared.cache.ledger import Refusal
from shared.clips.decode import Postponed

Role = Literal["both", "text", "vae"]
"""What a worker encodes."""


Activity = Literal["idle", "loading", "encoding", "waiting"]
"""What a worker is about; waiting: for decoded frames, and for nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A worker has a process on a node."""

    node_id: str
    """Ray's: several nodes may share an address."""
    node: str
    """Its address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """That a worker lives, and whether it gets on."""

    activity: Activity
    num_steps: int
    """Of its work so far; a worker that encodes and makes none is stuck."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What goes through a VAE at once."""

    frames: int
    pixels: int | None
    """Of each of these frames; smaller ones go through in larger numbers. None: as many of any size."""

    @classmethod
    def of(cls, latent: Mapping[str, Any]) -> "MicroBatch":
        """Returns that of the provenance of a cache's latents."""
        return cls(frames=latent["micro_batch"], pixels=latent.get("micro_batch_pixels"))


@dataclass(kw_only=True, slots=True)
class ShardNews:
    """What happened to a shard since the news before."""

    has_begun: bool = False
    """Its kernels are being launched: from now on it may be what the worker dies of."""
    num_encoded: int = 0
    """Samples or texts."""
    refusals: list[Refusal] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    """Of the worker, whatever shard they were about."""
    num_tokens: int = 0
    """Text tokens encoded by the worker, padding not counted."""
    shard: CommittedShard | None = None
    """In the last of its news."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A worker has its encoders."""

    provenance: Provenance
    """Of the streams that it encodes."""
    seconds: float
    """Of loading."""
    device: str
    """On which it encodes: the GPU's name, or ``cpu`` and the kind."""

    def told(self, *, on_gpu: bool) -> str:
        """Returns what encodes, for people.

        Args:
            on_gpu: Whether Ray set a GPU aside for the worker; that it does not use it is said.
        """
        line = f"encoding on {self.device}; the encoders loaded in {self.seconds:.0f} s"
        if on_gpu and self.device.startswith("cpu"):
            line += ". Ray set a GPU aside, and PyTorch sees none: install a CUDA build of torch, or say --device cpu"
        return line
