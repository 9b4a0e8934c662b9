"""``python -m train.sample``: videos from prompts, with a run's weights and the encoders of its cache."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import InputError, run_entry_point
from shared.spec import Bucket, VaeGeometry, latent_shape
from train.checkpoint_files import EMA_FILE, WEIGHTS_FILE, list_checkpoints
from train.diffusion import iddpm
from train.diffusion.guidance import guided as guided_prediction
from train.draws import sample_generator
from train.model.config import STDiTConfig, config_from_values
from train.model.stdit import STDiT
from train.run_folder import RunDescription, read_run
from train.sample_index import LATENT, TEXT
from train.video_files import file_stem, write_video_files


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Makes videos from prompts with the weights of a training run."""

    run: Path
    """The run's folder."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """What to show; give it several times for several videos."""
    output: Path
    """Where the files go: an MP4, a GIF and a filmstrip a prompt."""
    num_frames: int | None = None
    """Frames; those of the run's most common bucket by default."""
    height: int | None = None
    """In pixels, likewise."""
    width: int | None = None
    """In pixels, likewise."""
    steps: int = 100
    """Denoising steps."""
    guidance: float = 7.0
    """How far to go from the null caption's prediction towards the prompt's, and beyond; 1 is no guidance."""
    guidance_channels: int | None = None
    """Guide only so many of the first latent channels; all by default. Open-Sora v1.0 guides 3."""
    seed: int = 0
    """Decides the noise, together with the prompt."""
    ema: bool = True
    """Use the moving average of the weights."""
    checkpoint: Path | None = None
    """A checkpoint of the run; the newest by default."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("no --prompt: give one or more")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: expected at least 0")


def sample_videos(config: SampleConfig) -> int:
    """Samples a video for each prompt, writes the files, and returns the exit code.

    Raises:
        InputError: for a run, a size or encoders that do not fit.
    """
    run = read_run(config.run)
    architecture = config_from_values(run.model_config, STDiTConfig())
    if config.guidance != 1 and not architecture.class_dropout_prob:
        raise InputError("the run has caption_dropout=0, so its null caption is untrained: use --guidance 1")
    schedule = iddpm.respace(iddpm.linear_schedule(), config.steps)
    size = _latent_size(config, run, architecture)
    fps = float(_main_bucket(run)[1]["fps"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(config, architecture).to(device).eval()
    if device.type == "cuda" and run.config["precision"] == "bfloat16":
        model.bfloat16()
    captions = _encode(run, config.prompt, device)
    decode = _load_decoder(run, device)
    for prompt, caption in zip(config.prompt, captions, strict=True):
        latent = sample_latent(
            model,
            schedule,
            caption,
            size,
            prompt=prompt,
            seed=config.seed,
            guidance=config.guidance,
            guidance_channels=config.guidance_channels,
        )
        files = write_video_files(decode(latent), config.output, file_stem(prompt, config.seed), fps=fps)
        print(f"{prompt!r}: {', '.join(map(str, files))}", flush=True)
    return 0


def sample_latent(
    model: STDiT,
    schedule: iddpm.Schedule,
    caption: Tensor,  # (L, D)
    size: tuple[int, int, int],
    *,
    prompt: str,
    seed: int,
    guidance: float,
    guidance_channels: int | None = None,
) -> Tensor:
    """Returns one latent (C, T, H, W) of ``size``; its noise depends on the prompt and the seed alone.

    Args:
        model: In evaluation mode.
        schedule: Respaced to the steps to take.
        caption: The prompt's embedding.
        size: Latent frames, rows and columns.
        prompt: Names the noise.
        seed: Not negative.
        guidance: 1 is no guidance.
        guidance_channels: See :func:`train.diffusion.iddpm.guided`.
    """
    device = caption.device
    generator = sample_generator(seed, prompt)
    shape = (1, model.config.in_channels, *size)
    guided = guidance != 1
    y = caption[None, None].expand(2 if guided else 1, -1, -1, -1)
    drop = torch.tensor([False, True], device=device) if guided else None

    def draw_noise() -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype="float32")).to(device)

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        if not guided:
            return model(x, timestep, y)
        conditional, unconditional = model(torch.cat([x, x]), timestep.repeat(2), y, drop_caption=drop).chunk(2)
        return guided_prediction(conditional, unconditional, guidance, x.shape[1], guidance_channels)

    return iddpm.sample(schedule, denoise, draw_noise(), draw_noise)[0]


def _main_bucket(run: RunDescription) -> tuple[Bucket, dict[str, Any]]:
    name = max(run.buckets, key=lambda bucket: run.buckets[bucket]["samples"])
    return Bucket.parse(name), run.buckets[name]


def _latent_size(config: SampleConfig, run: RunDescription, architecture: STDiTConfig) -> tuple[int, int, int]:
    if config.num_frames is None and config.height is None and config.width is None:
        return architecture.input_size
    usual, _ = _main_bucket(run)
    bucket = Bucket(
        usual.num_frames if config.num_frames is None else config.num_frames,
        usual.height if config.height is None else config.height,
        usual.width if config.width is None else config.width,
    )
    size = latent_shape(bucket, VaeGeometry.recorded(run.provenance[LATENT]))[1:]
    architecture.grid(size)
    return size


def _load_model(config: SampleConfig, architecture: STDiTConfig) -> STDiT:
    checkpoint = config.checkpoint
    if checkpoint is None:
        complete = list_checkpoints(config.run)
        if not complete:
            raise InputError(f"{config.run}: the run has no checkpoint yet: train it further")
        checkpoint = complete[-1]
    file = checkpoint / (EMA_FILE if config.ema else WEIGHTS_FILE)
    if not file.is_file():
        raise InputError(f"{file}: no such file: expected a checkpoint of this run" + ", or --no-ema" * config.ema)
    model = STDiT(architecture)
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise InputError(f"{file}: weights of another model ({error})") from None
    return model


def _encode(run: RunDescription, prompts: tuple[str, ...], device: torch.device) -> list[Tensor]:
    from shared.encoders.t5 import TextEncoder  # imports transformers: not for --help

    recorded = run.provenance[TEXT]
    encoder = TextEncoder.load(
        recorded["model"],
        device=device,
        dtype=getattr(torch, recorded["precision"]),
        max_tokens=recorded["max_tokens"],
        cleaning=recorded["cleaning"],
    )
    _require_same_weights(TEXT, recorded, encoder.provenance())
    return [embedding.float() for embedding in encoder.encode(list(prompts))]


def _load_decoder(run: RunDescription, device: torch.device) -> Callable[[Tensor], Any]:
    from shared.encoders.vae import VideoAutoencoder  # imports diffusers: not for --help

    recorded = run.provenance[LATENT]
    vae = VideoAutoencoder.load(recorded["model"], device=device, dtype=getattr(torch, recorded["precision"]))
    _require_same_weights(LATENT, recorded, vae.provenance())
    return vae.decode


def _require_same_weights(stream: str, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    for key in ("weights_sha256", "scaling_factor", "shift_factor"):
        if recorded.get(key) != found.get(key):
            raise InputError(
                f"encoder {recorded['model']!r} of stream {stream!r}: the run's cache has {key}={recorded.get(key)}, "
                f"the model found has {found.get(key)}: put the cache's model in its place"
            )


def main() -> int:
    """Returns the exit code for the settings of the command line."""
    debug = "--debug" in sys.argv
    return run_entry_point(lambda: sample_videos(tyro.cli(SampleConfig, prog="python -m train.sample")), debug=debug)


if __name__ == "__main__":
    sys.exit(main())
