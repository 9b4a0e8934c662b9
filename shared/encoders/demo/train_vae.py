"""Train the demo's image autoencoder on a few films and photos.

    python -m shared.encoders.demo.train_vae --train film.mp4@23.1-30 photo.jpg --held-out tests/data/clips/meadow.mpg \
        --output FOLDER --device cuda

A few pictures suffice for an autoencoder of two million weights if no crop is seen twice: each is cut at a random place
from one level of its picture's pyramid, turned and recoloured; a quarter of them are collaged from two along straight
edges or stripes, which teaches the sharp edges and grids that the few pictures lack.

Shapes: B batch, C channels, H height, W width.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png"}
PYRAMID_HEIGHTS = (1080, 760, 540, 400, 290, 210)
EVAL_SIDE = 256
"""Held-out frames are cropped to this many pixels in the middle."""

Step = Callable[[], tuple[Tensor, Tensor]]
"""One optimizer step; returns the reconstruction loss and the KL divergence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainVaeConfig:
    """How the demo's autoencoder is trained."""

    train: tuple[str, ...]
    """Photos, and films with the seconds to take: `film.mp4@11.9-15.7`. Name no shot of a held-out clip."""
    held_out: tuple[Path, ...] = ()
    """Videos whose reconstruction is measured at the end."""
    start_from: Path | None = None
    """A model to go on from; random weights without it."""
    output: Path
    """Folder for the model; `psnr.json` is written beside its weights."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`."""
    steps: int = 20_000
    """Optimizer steps. The learning rate warms up over the first 3 % and follows a cosine to zero."""
    batch: int = 32
    """Crops a step."""
    crop_side: int = 128
    """Height and width of a crop in pixels, a multiple of 8."""
    learning_rate: float = 1.5e-3
    """The highest learning rate."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence from a unit Gaussian, the mean over latent values."""
    frames_per_range: int = 20
    """Frames taken from each range of a film, evenly spaced."""
    seed: int = 0
    """Seeds weights, crops and noise."""

    def __post_init__(self) -> None:
        if self.crop_side % 8 or self.crop_side > min(PYRAMID_HEIGHTS):
            raise ValueError(
                f"crop_side={self.crop_side}: expected a multiple of 8, at most {min(PYRAMID_HEIGHTS)} pixels"
            )


def build_vae() -> AutoencoderKL:
    """A diffusers image autoencoder of stride 8 with 16 latent channels and 2.0 million weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 80, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=EVAL_SIDE,
        mid_block_add_attention=False,
    )


def read_source(source: str, frames_per_range: int) -> list[Tensor]:
    """Pictures of a photo or of a range of a film, uint8 (C, H, W)."""
    path, _, seconds = source.partition("@")
    if Path(path).suffix.lower() in PHOTO_SUFFIXES:
        if seconds:
            raise ValueError(f"{source}: a photo has no seconds: leave out @{seconds}")
        return read_frames(Path(path), 0.0, math.inf)[:1]
    start, stop = (float(bound) for bound in seconds.split("-")) if seconds else (0.0, math.inf)
    return evenly_spaced(read_frames(Path(path), start, stop), frames_per_range)


def read_frames(path: Path, start_seconds: float, stop_seconds: float) -> list[Tensor]:
    """Frames shown in the half-open range of seconds from the first frame on, uint8 (C, H, W)."""
    frames: list[Tensor] = []
    first_seconds: float | None = None
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            first_seconds = frame.time if first_seconds is None else first_seconds
            seconds = (frame.time or 0.0) - (first_seconds or 0.0)
            if seconds >= stop_seconds:
                break
            if seconds >= start_seconds:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
    if not frames:
        raise ValueError(f"{path}: no frame between {start_seconds} and {stop_seconds} seconds")
    return frames


def evenly_spaced(frames: list[Tensor], count: int) -> list[Tensor]:
    """`count` of the frames, first and last among them, or all if there are fewer."""
    if len(frames) <= count:
        return frames
    return [frames[round(index * (len(frames) - 1) / max(count - 1, 1))] for index in range(count)]


class Crops:
    """Draws random training crops from pictures at several scales."""

    def __init__(self, pictures: list[Tensor], *, side: int, device: str) -> None:
        """Build each picture's pyramid on the device: no level is larger than the picture itself."""
        self.side = side
        self.levels: list[list[Tensor]] = []
        for picture in pictures:
            height, width = picture.shape[1:]
            if min(height, width) < side:
                raise ValueError(f"a training picture of {width}x{height} is smaller than the crop of {side} pixels")
            scales = [level / min(height, width) for level in PYRAMID_HEIGHTS if level < min(height, width)]
            image = picture.to(device)[None].float()
            sizes = [(round(height * scale), round(width * scale)) for scale in scales]
            smaller = [F.interpolate(image, size, mode="bicubic", antialias=True)[0] for size in sizes]
            self.levels.append([level.clamp(0, 255).round().byte() for level in (image[0], *smaller)])

    def draw(self, batch: int) -> Tensor:
        """Plain crops in [-1, 1], float32 (B, C, H, W)."""
        crops = []
        for choice, level_at, top_at, left_at in torch.rand(batch, 4).tolist():
            pyramid = self.levels[int(choice * len(self.levels))]
            image = pyramid[int(level_at * len(pyramid))]
            top = int(top_at * (image.shape[1] - self.side + 1))
            left = int(left_at * (image.shape[2] - self.side + 1))
            crops.append(image[:, top : top + self.side, left : left + self.side])
        return torch.stack(crops).float() / 127.5 - 1


def augment(x: Tensor) -> Tensor:
    """Crops turned, recoloured and a quarter of them collaged; same shape and range as x (B, C, H, W)."""
    if torch.rand(()) < 0.5:
        x = x.flip(-1)
    if torch.rand(()) < 0.5:
        x = x.flip(-2)
    if torch.rand(()) < 0.5:
        x = x.transpose(-1, -2)
    return collage(recolour(x)).contiguous()


def recolour(x: Tensor) -> Tensor:
    """Crops with random gains and offsets a channel, the channels of some of them rolled."""
    B = len(x)
    gain = torch.empty(B, 1, 1, 1, device=x.device).uniform_(0.7, 1.3)
    gain = gain * torch.empty(B, 3, 1, 1, device=x.device).uniform_(0.9, 1.1)
    offset = torch.empty(B, 1, 1, 1, device=x.device).uniform_(-0.2, 0.2)
    rolled = torch.rand(B, 1, 1, 1, device=x.device) < 0.25
    return (torch.where(rolled, x.roll(1, dims=1), x) * gain + offset).clamp(-1, 1)


def collage(x: Tensor) -> Tensor:
    """A quarter of the crops with another crop showing through along a straight edge or stripes.

    The stripes' period is log-uniform between 3 pixels and four crops: the long ones show one edge or none.
    """
    B, side = len(x), x.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(B, 1, 1, 1, device=x.device).uniform_(low, high)

    at = torch.arange(side, device=x.device, dtype=x.dtype)
    angle, period = uniform(0, 2 * math.pi), uniform(math.log(3), math.log(4 * side)).exp()
    across = at.view(1, 1, 1, -1) * angle.cos() + at.view(1, 1, -1, 1) * angle.sin()
    wave = torch.sin(2 * math.pi * across / period + uniform(0, 2 * math.pi)) - uniform(-0.7, 0.7)
    # The edge is one pixel wide, as it is in a picture that was scaled down.
    opacity = (wave * period / (2 * math.pi) + 0.5).clamp(0, 1) * (uniform(0, 1) < 0.25)
    return torch.lerp(x, x.roll(1, dims=0), opacity)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Squared error at full and at an eighth of the size, and a little absolute error, weighted to be of one order.

    The eighth is what one latent pixel shows on average: without it, colours are learned last.
    """
    error = y.float() - x
    return 10 * error.square().mean() + 5 * F.avg_pool2d(error, 8).square().mean() + 0.2 * error.abs().mean()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine to zero."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(config: TrainVaeConfig, crops: Crops) -> AutoencoderKL:
    """The moving average of the weights over the training."""
    device = torch.device(config.device)
    on_gpu = device.type == "cuda"
    vae = build_vae()
    if config.start_from is not None:
        vae = AutoencoderKL.from_pretrained(config.start_from, torch_dtype=torch.float32).train().requires_grad_(True)
    vae.to(device, memory_format=torch.channels_last)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    # A learning rate in a tensor can change between replays of a captured step.
    learning_rate = torch.tensor(config.learning_rate, device=device) if on_gpu else config.learning_rate
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, capturable=on_gpu
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config.steps))
    x = torch.zeros(config.batch, 3, config.crop_side, config.crop_side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        # Convolutions in bfloat16 are many times slower than in float32 on a CPU without bfloat16 units.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            y = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        reconstruction = reconstruction_loss(y, x)
        (reconstruction + config.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return reconstruction.detach(), kl.detach()

    run_step = capture(step, lambda: x.copy_(augment(crops.draw(config.batch)))) if on_gpu else step
    started = time.monotonic()
    for index in range(config.steps):
        x.copy_(augment(crops.draw(config.batch)))
        reconstruction, kl = run_step()
        schedule.step()
        if index % 10 == 9:
            average.update_parameters(vae)
        if index % max(1, config.steps // 20) == 0:
            seconds = time.monotonic() - started
            print(f"step {index} loss {reconstruction.item():.4f} kl {kl.item():.2f} seconds {seconds:.0f}", flush=True)
    average.update_parameters(vae)
    return average.module.eval()


def capture(
    step: Callable[[], tuple[Tensor, Tensor]], refill: Callable[[], object]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The step as one CUDA graph, after a few plain steps: launching its small kernels one by one takes longer."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            refill()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return losses

    return replay


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, crops: Crops, num_crops: int = 512) -> dict[str, float]:
    """Mean and deviation of sampled latents over plain crops, and the posterior's mean deviation."""
    posteriors = [vae.encode(crops.draw(32)).latent_dist for _ in range(num_crops // 32)]
    latents = torch.cat([posterior.sample() for posterior in posteriors])
    deviation = torch.cat([posterior.std for posterior in posteriors])
    channels = latents.std(dim=(0, 2, 3))
    return {
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
        "latent_channel_std_min": channels.min().item(),
        "latent_channel_std_max": channels.max().item(),
        "posterior_std": deviation.mean().item(),
    }


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, path: Path, device: str, num_frames: int = 4) -> float:
    """PSNR in dB of frames of a video, cropped in the middle, through the posterior's mean."""
    frames = torch.stack(evenly_spaced(read_frames(path, 0.0, math.inf), num_frames))
    top, left = ((length - EVAL_SIDE) // 2 for length in frames.shape[-2:])
    x = frames[..., top : top + EVAL_SIDE, left : left + EVAL_SIDE].to(device).float() / 127.5 - 1
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return 10 * math.log10(4 / (y - x).square().mean().item())


def main(config: TrainVaeConfig) -> None:
    """Train, write the model with its scaling factor in float16, and measure what was written."""
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    pictures = [picture for source in config.train for picture in read_source(source, config.frames_per_range)]
    crops = Crops(pictures, side=config.crop_side, device=config.device)
    vae = train(config, crops)

    latents = measure_latents(vae, crops)
    vae.register_to_config(scaling_factor=round(1 / latents["latent_std"], 4))
    vae.half().save_pretrained(config.output)
    saved = AutoencoderKL.from_pretrained(config.output, torch_dtype=torch.float32).to(config.device).eval()
    psnr = {path.name: round(measure_psnr(saved, path, config.device), 2) for path in config.held_out}
    report = {"psnr_db": psnr, "num_pictures": len(pictures), "steps": config.steps, **latents}
    (config.output / "psnr.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(TrainVaeConfig))
