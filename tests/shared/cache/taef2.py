"""The tiny autoencoder for FLUX.2's latents (8x, 32 channels), built from its published state dicts.

The network is madebyollin/taesd's (MIT): blocks of three convolutions, those at the lowest resolution with a normalised
side branch before them. It is here to judge codecs by the videos that they give, and takes no other part:
``python -m tests.shared.cache.taef2 --weights FOLDER --clips FILE ...`` made a table in ``docs/codecs.md``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from shared.cache.codec_report import LATENT_CODECS, Videos, measure, table
from shared.codec import Codec
from shared.media.clip import Media, centre_window
from shared.media.video import decode_window, presentation_times
from shared.spec import Bucket

WIDTH = 64
LATENT_CHANNELS = 32


class Block(nn.Module):
    """(N, 64, H, W) -> the same shape."""

    def __init__(self, *, side_branch: bool) -> None:
        super().__init__()
        inner = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        first, second, third = inner
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        if side_branch:
            self.pool: nn.Sequential | None = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        else:
            self.pool = None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """Brings latents into -3 .. 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _blocks(*, side_branch: bool = False) -> list[nn.Module]:
    return [Block(side_branch=side_branch) for _ in range(3)]


def _down() -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)


def _up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]


def _encoder() -> nn.Sequential:
    first = [nn.Conv2d(3, WIDTH, 3, padding=1), Block(side_branch=False)]
    last = nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1)
    return nn.Sequential(*first, _down(), *_blocks(), _down(), *_blocks(), _down(), *_blocks(side_branch=True), last)


def _decoder() -> nn.Sequential:
    first = [SoftClamp(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
    last = [Block(side_branch=False), nn.Conv2d(WIDTH, 3, 3, padding=1)]
    return nn.Sequential(*first, *_blocks(side_branch=True), *_up(), *_blocks(), *_up(), *_blocks(), *_up(), *last)


class Taef2:
    """Encodes and decodes videos frame by frame."""

    def __init__(self, folder: Path) -> None:
        """Loads ``taef2_encoder.pth`` and ``taef2_decoder.pth``, float16 state dicts, from ``folder``."""
        self.encoder, self.decoder = _encoder(), _decoder()
        for name, network in (("encoder", self.encoder), ("decoder", self.decoder)):
            network.load_state_dict(torch.load(folder / f"taef2_{name}.pth", weights_only=True))
            network.eval().requires_grad_(False)

    def encode(self, frames: np.ndarray) -> Tensor:
        """Returns the latent (32, T, H/8, W/8), bfloat16, of frames (T, H, W, 3), uint8."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        latent = torch.cat([self.encoder(frame[None]) for frame in video])
        return latent.transpose(0, 1).bfloat16().contiguous()

    def decode(self, latent: Tensor) -> np.ndarray:
        """Returns the frames (T, H, W, 3), uint8, of a latent (32, T, H/8, W/8)."""
        video = torch.cat([self.decoder(frame[None]) for frame in latent.float().transpose(0, 1)])
        return (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def read_clip(path: Path, num_frames: int = 16) -> np.ndarray:
    """Returns frames (T, 256, 256, 3), uint8, from the middle of a clip."""
    media = Media(url=str(path.absolute()))
    window = centre_window(len(presentation_times(media)), num_frames=num_frames, interval=1)
    return decode_window(media, None, window, Bucket(num_frames, 256, 256))


@dataclass(frozen=True, kw_only=True, slots=True)
class Taef2Config:
    """Measure codecs on latents of real clips, 16 frames of 256x256 from the middle of each, and on their videos."""

    weights: Path
    """The folder of ``taef2_encoder.pth`` and ``taef2_decoder.pth``."""
    clips: tuple[Path, ...]
    """Video files."""
    codecs: str = LATENT_CODECS
    """Codecs to try, apart by spaces."""
    num_frames: int = 16
    """Frames of each clip. 1: as images."""


if __name__ == "__main__":
    config = tyro.cli(Taef2Config)
    torch.set_num_threads(1)
    network = Taef2(config.weights)
    clips = [read_clip(path, config.num_frames) for path in config.clips]
    latents = [network.encode(clip) for clip in clips]
    codecs = [Codec.parse(codec) for codec in config.codecs.split()]
    print(table(measure(latents, codecs, videos=Videos(decode=network.decode, clips=clips))))
