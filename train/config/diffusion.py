"""What the model learns to undo."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from shared.errors import InputError
from train.config.settings import require_positive
from train.diffusion.frame_masks import MaskStrategy, parse_mask_ratios
from train.diffusion.objective import ObjectiveName
from train.diffusion.rectified_flow import TimeDistribution


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionOptions:
    """What the model learns to undo, and how often without the caption."""

    objective: ObjectiveName | None = None
    """IDDPM or rectified flow; None takes the model's published one: rectified flow for stdit3, IDDPM for others."""
    min_snr_gamma: float | None = None
    """IDDPM: weigh the noise's error by min(SNR, gamma) / SNR. 5 is usual; None weighs all levels alike."""
    flow_times: TimeDistribution | None = None
    """Rectified flow: how times are distributed; None is logit-normal."""
    flow_shift: bool | None = None
    """Rectified flow: whether larger and longer clips get more noise; None is True."""
    mask_ratios: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STRATEGY=RATIO ...")] = ()
    """How often frames are given rather than made, e.g. ``random=0.05 image_head=0.1``; for models with frame masks."""
    caption_dropout: float = 0.1
    """How often the null caption is trained, for guidance."""

    def __post_init__(self) -> None:
        require_positive(self, "min_snr_gamma")
        parse_mask_ratios(self.mask_ratios)
        if not 0 <= self.caption_dropout < 1:
            raise InputError(f"caption_dropout={self.caption_dropout}: expected 0 <= p < 1")

    @property
    def mask_shares(self) -> dict[MaskStrategy, float] | None:
        """How often each strategy is taken; None if no frames are ever given."""
        return parse_mask_ratios(self.mask_ratios) if self.mask_ratios else None
