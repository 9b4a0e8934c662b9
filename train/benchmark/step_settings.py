"""The rows of the step benchmarks: what is trained, at what size, in which ways."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from train.benchmark.variants import (
    FUSED,
    FUSED_CUDNN,
    FUSED_FLOAT8,
    FUSED_FLOAT8_GRAPHS,
    FUSED_GRAPHS,
    FUSED_PLAIN_PRODUCTS,
    PLAIN,
    Variant,
)
from train.config.parallel import Checkpointing
from train.ops.reference import Kernel

SPATIAL_STRIDE = 8
"""Pixels by which latents are smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is trained, and at what size."""

    model: str
    frames: int
    size: int
    """Pixels of height and width."""
    batch: int
    """Samples of a rank, or of the ranks that share their samples."""
    checkpointing: Checkpointing = "none"
    labels: bool = False
    """Class labels in place of captions."""
    variants: tuple[Variant, ...] = (PLAIN, FUSED, FUSED_CUDNN)
    """FUSED_CUDNN beside FUSED is run only where FUSED takes FlashAttention 3."""
    published: float | None = None
    """Tokens (of images: images) a second that Open-Sora v1.0's acceleration page gives for one H800."""
    published_of: Mapping[str, float] = field(default_factory=dict)
    """Likewise, for variants that have figures of their own."""
    blocks: int | None = None
    """Steps that would take longer than 20 seconds run this many blocks, and are scaled to all of them."""
    num_ranks: int = 1
    """Ranks on which it runs, with ZeRO 2."""
    sequence_parallel: int = 1
    """Ranks that share a sample's tokens."""
    against_one: bool = False
    """Whether the row of one rank with the same model, size and batch is measured too, just before."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        alone = f"{self.model} {self.frames}x{self.size}{' labels' * self.labels}"
        if self.num_ranks == 1:
            return alone
        return f"{alone}, {self.num_ranks} GPUs{' a sample' * (self.sequence_parallel > 1)}"

    def is_named(self, parts: tuple[str, ...]) -> bool:
        """Returns whether a word of the name begins with one of ``parts``, so that dit does not mean stdit; all do
        where there are none."""
        return not parts or any(f" {part}" in f" {self.name}" for part in parts)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        return self.frames, self.size // SPATIAL_STRIDE, self.size // SPATIAL_STRIDE

    def published_for(self, variant: str) -> float | None:
        """Returns what was published for a variant, or None."""
        return self.published_of.get(variant, self.published)


def _plain_with_each(*kernels: Kernel) -> tuple[Variant, ...]:
    """Returns the plain form, and with cuDNN's attention or one of our kernels by itself."""
    cudnn = Variant(name="plain, cuDNN attention", kernels=(), backend="cudnn", transposes=True)
    fused = (
        Variant(name=f"plain, fused {name}", kernels=(name,), backend="flash", transposes=True) for name in kernels
    )
    return PLAIN, cudnn, *fused


IMAGES = (
    Setting(
        model="dit-xl/2",
        frames=1,
        size=256,
        batch=128,
        labels=True,
        published=175,
        variants=(*_plain_with_each("modulation", "gelu", "linear"), FUSED, FUSED_FLOAT8, FUSED_FLOAT8_GRAPHS),
    ),
    Setting(model="dit-xl/2", frames=1, size=256, batch=128, published=175),
    Setting(model="stdit-xl/2", frames=1, size=256, batch=96, published=175),
)
"""Images of 256x256. STDiT's plain form takes more than 80 GB at a batch of 128."""

_EACH_PART = (
    *_plain_with_each("modulation", "time", "captions", "gelu", "linear"),
    FUSED,
    FUSED_CUDNN,
    FUSED_PLAIN_PRODUCTS,
    FUSED_GRAPHS,
    FUSED_FLOAT8,
    FUSED_FLOAT8_GRAPHS,
)

STDIT = (
    Setting(model="stdit-xl/2", frames=16, size=256, batch=8, published=28_000, variants=_EACH_PART),
    Setting(model="stdit-xl/2", frames=16, size=512, batch=2, published=23_000),
    Setting(model="stdit-xl/2", frames=64, size=512, batch=1, checkpointing="auto", published=25_000),
    Setting(model="dit-xl/2", frames=16, size=256, batch=8, published=29_000),
    Setting(model="dit-xl/2", frames=16, size=512, batch=2, published=14_000),
    Setting(model="dit-xl/2", frames=64, size=512, batch=1, checkpointing="auto", published=5_000),
    Setting(
        model="dit-xl/2", frames=256, size=512, batch=1, checkpointing="auto", blocks=4, variants=(FUSED, FUSED_CUDNN)
    ),  # without the plain form: a step takes long, and nothing was published for it
    Setting(
        model="stdit3-xl/2",
        frames=16,
        size=256,
        batch=4,
        checkpointing="auto",
        variants=(PLAIN, FUSED, FUSED_CUDNN, FUSED_GRAPHS),
    ),
    Setting(
        model="stdit-xl/2",
        frames=256,
        size=512,
        batch=1,
        checkpointing="auto",
        published=18_000,
        variants=(FUSED, FUSED_CUDNN),
        num_ranks=2,
        sequence_parallel=2,
    ),
    Setting(
        model="stdit-xl/2",
        frames=16,
        size=256,
        batch=8,
        published=28_000,
        variants=(FUSED, FUSED_GRAPHS),
        num_ranks=2,
        against_one=True,
    ),
)
"""DiT against STDiT, STDiT3, and STDiT on two GPUs. By count all fit on 80 GB, with ``auto`` each form as it can."""

CACHED = "cached"
BASELINE = "baseline"
FASTER_T5 = "faster T5"
FASTER_BOTH = "faster T5, autoencoder in small passes"
WAYS = (BASELINE, FASTER_T5, FASTER_BOTH)

ONLINE = (
    Setting(
        model="stdit-xl/2",
        frames=16,
        size=256,
        batch=6,
        checkpointing="auto",
        published_of={CACHED: 28_000, BASELINE: 25_000, FASTER_T5: 29_000},
    ),
    Setting(
        model="stdit-xl/2",
        frames=16,
        size=512,
        batch=2,
        checkpointing="auto",
        published_of={CACHED: 23_000, BASELINE: 15_000, FASTER_BOTH: 23_000},
    ),
)
"""Encoding in front of every step. T5-XXL takes 9 GB beside the model."""
