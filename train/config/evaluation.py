"""How a run is judged while it goes on."""

from dataclasses import dataclass
from pathlib import Path

from shared.errors import InputError
from train.config.settings import MayChange, require_at_least

_SAMPLES, _LEVELS, _PREVIEWS, _GUIDANCE = 128, 4, 4, 7.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """How a run is judged while it goes on: by its loss on samples that are held out, and by videos."""

    evaluate_every: MayChange[int | None] = None
    """Steps from one evaluation on --holdout's samples to the next; the last step has one too. None: never."""
    evaluate_samples: MayChange[int] = _SAMPLES
    """Samples of an evaluation: always the same ones, with the same noise."""
    evaluate_levels: MayChange[int] = _LEVELS
    """Noise levels at which each of them is judged: the middles of so many equal shares of training."""
    preview_every: MayChange[int | None] = None
    """Steps from one set of previews to the next, in OUTPUT/previews; the last step has them too. None: never."""
    preview_prompts: MayChange[Path | None] = None
    """A file of prompts, one a line; by default captions of the cache itself, of what is held out if anything is."""
    previews: MayChange[int] = _PREVIEWS
    """Videos of a set, if their prompts are the cache's."""
    preview_sampling_steps: MayChange[int | None] = None
    """Denoising steps; the sampler's usual number by default."""
    preview_guidance: MayChange[float] = _GUIDANCE
    """See python -m train.sample; 1 is no guidance."""
    judge_ema: MayChange[bool | None] = None
    """Evaluate and preview the moving average of the weights rather than the weights; by default if there is one."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            *("evaluate_every", "evaluate_samples", "evaluate_levels", "preview_every", "previews"),
            "preview_sampling_steps",
        )
        if self.evaluate_every is None and (self.evaluate_samples, self.evaluate_levels) != (_SAMPLES, _LEVELS):
            raise InputError("evaluate_samples and evaluate_levels do nothing without --evaluate-every")
        if self.preview_every is None and (
            self.preview_prompts is not None
            or self.preview_sampling_steps is not None
            or (self.previews, self.preview_guidance) != (_PREVIEWS, _GUIDANCE)
        ):
            raise InputError("options of previews do nothing without --preview-every")
        if self.preview_prompts is not None and self.previews != _PREVIEWS:
            raise InputError(f"previews={self.previews} does nothing with --preview-prompts: it has as many as it has")
        if self.judge_ema is not None and self.evaluate_every is None and self.preview_every is None:
            raise InputError("judge_ema does nothing without --evaluate-every or --preview-every")
