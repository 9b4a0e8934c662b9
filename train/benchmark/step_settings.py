"""The rows of the step benchmarks: what is trained, at what size, in which ways."""

from dataclasses import dataclass

from train.benchmark.variants import FUSED, PLAIN, Variant
from train.model.checkpointing import ActivationCheckpointing
from train.ops.reference import KERNELS


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is trained, and at what size."""

    model: str
    frames: int
    size: int
    """Pixels of height and width; latents are 8 times smaller."""
    batch: int
    checkpointing: ActivationCheckpointing = "none"
    labels: bool = False
    """Class labels in place of captions."""
    variants: tuple[Variant, ...] = (PLAIN, FUSED)
    published: str = ""
    """Tokens (of images: images) a second that Open-Sora v1.0's acceleration page gives for one H800."""
    blocks: int | None = None
    """Steps that would take longer than 20 seconds run this many blocks, and are scaled to all of them."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        computed_again = "" if self.checkpointing == "none" else f" {self.checkpointing}"
        return f"{self.model} {self.frames}x{self.size}{' labels' * self.labels}{computed_again}"


_CUDNN = Variant(name="plain, cuDNN attention", kernels=(), backend=None, transposes=True)

IMAGES = (
    Setting(
        model="dit-xl/2",
        frames=1,
        size=256,
        batch=128,
        labels=True,
        published="100 (OpenSora 175)",
        variants=(
            PLAIN,
            _CUDNN,
            Variant(name="plain, fused modulation", kernels=("modulation",), backend="flash", transposes=True),
            FUSED,
        ),
    ),
    Setting(model="dit-xl/2", frames=1, size=256, batch=128, published="100 (OpenSora 175)"),
    Setting(model="stdit-xl/2", frames=1, size=256, batch=128, published="175"),
)
"""Images of 256x256."""

_EACH_PART = (
    PLAIN,
    _CUDNN,
    *(Variant(name=f"plain, fused {name}", kernels=(name,), backend="flash", transposes=True) for name in KERNELS),
    FUSED,
)

STDIT = (
    Setting(model="stdit-xl/2", frames=16, size=256, batch=6, published="28k", variants=_EACH_PART),
    Setting(model="stdit-xl/2", frames=16, size=512, batch=2, published="23k"),
    Setting(model="stdit-xl/2", frames=64, size=512, batch=1, checkpointing="full", published="25k"),
    Setting(model="stdit-xl/2", frames=64, size=512, batch=1, checkpointing="selective", published="25k"),
    Setting(model="dit-xl/2", frames=16, size=256, batch=8, published="29k"),
    Setting(model="dit-xl/2", frames=16, size=512, batch=2, published="14k"),
    Setting(model="dit-xl/2", frames=64, size=512, batch=1, checkpointing="full", published="5k"),
    Setting(model="dit-xl/2", frames=256, size=512, batch=1, checkpointing="full", blocks=4),
    Setting(model="stdit3-xl/2", frames=16, size=256, batch=4),
)
"""DiT against STDiT, and STDiT3. On 80 GB all fit but 64x512 selective, which takes 92 GiB."""

ONLINE = (
    Setting(model="stdit-xl/2", frames=16, size=256, batch=4, published="25k, faster T5 29k"),
    Setting(model="stdit-xl/2", frames=16, size=512, batch=1, published="15k, faster T5 and autoencoder 23k"),
)
"""Encoding in front of every step. T5-XXL takes 9 GB beside the model, so batches are smaller than from a cache."""
