"""What ``python -m train.sample`` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared.errors import InputError
from train.diffusion.objective import ObjectiveName
from train.diffusion.samplers import SamplerName
from train.sampling.files import Format

Weights = Literal["ema", "plain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Makes videos from prompts, with the weights of a training run or published ones."""

    output: Path
    """Where the files go."""
    run: Path | None = None
    """A training run's folder: its model, and the encoders of its cache."""
    checkpoint: Path | None = None
    """With --run, one of its checkpoints; the newest by default. With --cache, published weights: a file, a folder with
    model.safetensors and config.json, or either at Hugging Face (OWNER/NAME, OWNER/NAME/FILE)."""
    cache: str | None = None
    """Of published weights: a cache whose encoders belong to them."""
    model: str | None = None
    """Of published weights without a config.json: a preset, e.g. stdit-xl/2."""
    model_settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Of published weights: settings that differ from the preset, e.g. ``space_scale=0.5``. Values are JSON."""
    objective: ObjectiveName | None = None
    """Of published weights: what they were trained for; rectified flow of stdit3, IDDPM of others by default."""
    weights: Weights = "ema"
    """Of a run: the moving average of its weights, or the weights themselves."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to show; give it several times for several videos."""
    prompts: Path | None = None
    """A file of prompts, one a line; lines that begin with # are left out."""
    condition: Path | None = None
    """An image or video with which each clip begins, for models with frame masks: it is animated, or continued."""
    condition_frames: int | None = None
    """How many of the last frames of --condition; by default as many as a quarter of the clip."""

    num_frames: int | None = None
    """Frames; those of the most common bucket of clips by default. 1 makes an image."""
    height: int | None = None
    """In pixels, likewise."""
    width: int | None = None
    """In pixels, likewise."""
    fps: float | None = None
    """Frames a second, of the files and as STDiT3 is told; likewise."""

    sampler: SamplerName | None = None
    """ancestral, ddim or dpm++ for IDDPM, euler for rectified flow; the first of these by default."""
    steps: int | None = None
    """Denoising steps; by default 100 (ancestral), 50 (ddim), 20 (dpm++) or 30 (euler)."""
    guidance: float = 7.0
    """How far to go from the null caption's prediction towards the prompt's, and beyond; 1 is no guidance."""
    guidance_channels: int | None = None
    """Guide only so many of the first latent channels; all by default. Open-Sora v1.0 guides 3."""
    seed: int = 0
    """Decides the noise, together with the prompt."""

    batch_size: int | None = None
    """Prompts that are sampled at once; by default as many as the memory holds by a count, at most 8."""
    formats: tuple[Format, ...] = ()
    """mp4, gif, png (a strip of frames), grid (one PNG, a strip for each prompt); by default the first three, of images
    png."""
    decode_frames: int | None = None
    """Most frames that go through the autoencoder's decoder at once, where it can take a part of a clip; 16 by
    default."""
    decode_tiles: bool = False
    """Decode large frames in overlapping tiles: less memory, at a loss, see docs/diffusion.md."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not self.prompt and self.prompts is None:
            raise InputError("no --prompt: give one or more, or a file of them with --prompts")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: expected at least 0")
        for name in ("batch_size", "condition_frames", "decode_frames", "num_frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        if self.fps is not None and not self.fps > 0:
            raise InputError(f"fps={self.fps}: expected more than 0")
        if self.condition_frames is not None and self.condition is None:
            raise InputError(f"condition_frames={self.condition_frames} does nothing without --condition")
        if self.run is None:
            if self.checkpoint is None or self.cache is None:
                raise InputError("whose weights? give --run RUN, or --checkpoint FILE_OR_FOLDER and --cache CACHE")
            if self.weights != "ema":
                raise InputError(f"weights={self.weights} is for a run: --checkpoint names the file itself")
            return
        for name in ("model", "cache", "model_settings", "objective"):
            if getattr(self, name):
                raise InputError(f"{name}={getattr(self, name)} is for published weights: a run knows its own")
