"""Open-Sora's video autoencoder 1.2: SDXL's image autoencoder, and a causal one over its latents in time.

Written from the published code (hpcaitech/Open-Sora, ``opensora/models/vae``), with its names of weights, so that
``hpcai-tech/OpenSora-VAE-v1.2`` loads by name. 17 frames become 5 latent frames: three empty ones are put before the
first, and time is halved twice. Longer clips are cut into chunks of 17, each encoded by itself.

Letters: B clips, C channels, T frames, h and w rows and columns.
"""

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_FRAMES = 17
"""Frames that are encoded together, as the published pipeline has it (``micro_frame_size``)."""
SHIFT = (-0.10, 0.34, 0.27, 0.98)
SCALE = (3.85, 2.32, 2.33, 3.06)
"""The published mean and deviation of each latent channel: ``(z - SHIFT) / SCALE`` is stored."""
SPATIAL_SCALE = 0.18215
"""What the image latents are multiplied by; not SDXL's own factor, for the temporal part was trained so."""
SPATIAL_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""SDXL's image autoencoder, whose weights are in the published file."""
TEMPORAL_CONFIG: dict[str, Any] = {
    "channels": 4,
    "filters": 128,
    "num_res_blocks": 4,
    "channel_multipliers": (1, 2, 2, 4),
    "temporal_downsample": (False, True, True),
    "num_groups": 32,
}


class OpenSoraVae(nn.Module):
    """The autoencoder of images and the one of time.

    Args:
        spatial: Configuration of the image autoencoder, an ``AutoencoderKL``.
        temporal: Sizes of the one of time, as ``TEMPORAL_CONFIG``.
        shift: Mean of each latent channel.
        scale: Deviation of each latent channel.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        spatial: dict[str, Any] = SPATIAL_CONFIG,
        temporal: dict[str, Any] = TEMPORAL_CONFIG,
        shift: tuple[float, ...] = SHIFT,
        scale: tuple[float, ...] = SCALE,
    ) -> None:
        super().__init__()
        self.spatial_vae = _Spatial(spatial)
        self.temporal_vae = _Temporal(**temporal)
        self.register_buffer("scale", torch.tensor(scale)[None, :, None, None, None])
        self.register_buffer("shift", torch.tensor(shift)[None, :, None, None, None])

    @property
    def temporal_stride(self) -> int:
        """Frames a latent frame."""
        return self.temporal_vae.stride

    def encode(self, pixels: Tensor, frames_a_pass: int) -> tuple[Tensor, Tensor]:
        """Returns mean and logarithm of the variance of the latent, (B, C, T', h/8, w/8) each, not normalised.

        The published code draws a sample of the image posterior on the way; this takes its mean.

        Args:
            pixels: (B, 3, T, h, w), -1 to 1.
            frames_a_pass: Frames that go through the image autoencoder at once.
        """
        frames = pixels.transpose(1, 2).flatten(0, 1)  # (B*T, 3, h, w)
        images = torch.cat(
            [self.spatial_vae.module.encode(part).latent_dist.mean for part in frames.split(frames_a_pass)]
        )
        images = images.unflatten(0, (len(pixels), -1)).transpose(1, 2) * SPATIAL_SCALE  # (B, C, T, h/8, w/8)
        moments = torch.cat([self.temporal_vae.encode(chunk) for chunk in images.split(CHUNK_FRAMES, dim=2)], dim=2)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latent: Tensor, num_frames: int, frames_a_pass: int) -> Tensor:
        """Returns pixels (B, 3, T, h, w), about -1 to 1, of latents (B, C, T', h/8, w/8) that are not normalised."""
        chunk_latents = math.ceil(CHUNK_FRAMES / self.temporal_stride)
        images = []
        for part in latent.split(chunk_latents, dim=2):
            images.append(self.temporal_vae.decode(part, min(CHUNK_FRAMES, num_frames)))
            num_frames -= CHUNK_FRAMES
        frames = (torch.cat(images, dim=2) / SPATIAL_SCALE).transpose(1, 2).flatten(0, 1)  # (B*T, C, h/8, w/8)
        pixels = torch.cat([self.spatial_vae.module.decode(part).sample for part in frames.split(frames_a_pass)])
        return pixels.unflatten(0, (len(latent), -1)).transpose(1, 2)


class _Spatial(nn.Module):
    """Holds the image autoencoder under its published name."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.module = AutoencoderKL(**config)


class _Temporal(nn.Module):
    """An autoencoder that halves time where ``temporal_downsample`` says so, and leaves space as it is."""

    def __init__(
        self,
        *,
        channels: int,
        filters: int,
        num_res_blocks: int,
        channel_multipliers: tuple[int, ...],
        temporal_downsample: tuple[bool, ...],
        num_groups: int,
    ) -> None:
        super().__init__()
        self.stride: int = 2 ** sum(temporal_downsample)
        widths = [filters * multiplier for multiplier in channel_multipliers]
        self.encoder = _Encoder(channels, widths, num_res_blocks, temporal_downsample, num_groups)
        self.quant_conv = _CausalConv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = _CausalConv(channels, channels, 1)
        self.decoder = _Decoder(channels, widths, num_res_blocks, temporal_downsample, num_groups)

    def encode(self, images: Tensor) -> Tensor:
        """Returns mean and log-variance, (B, 2C, T', H, W), of image latents (B, C, T, H, W)."""
        padded = F.pad(images, (0, 0, 0, 0, -images.shape[2] % self.stride, 0))
        moments: Tensor = self.quant_conv(self.encoder(padded))
        return moments

    def decode(self, latent: Tensor, num_frames: int) -> Tensor:
        """Returns image latents (B, C, num_frames, H, W) of latents (B, C, T', H, W)."""
        images: Tensor = self.decoder(self.post_quant_conv(latent))
        return images[:, :, -num_frames % self.stride :]


class _CausalConv(nn.Module):
    """A convolution whose frames see none after them."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, kernel, stride=(stride, 1, 1), bias=bias)
        side, before = kernel // 2, kernel - stride
        self._padding = (side, side, side, side, before, 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, self._padding))
        return y


class _ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, channels)
        self.conv1 = _CausalConv(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out)
        self.conv2 = _CausalConv(out, out, 3, bias=False)
        self.conv3 = _CausalConv(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        y: Tensor = self.conv3(x) + h
        return y


class _Encoder(nn.Module):
    def __init__(
        self, channels: int, widths: list[int], num_res_blocks: int, halve: tuple[bool, ...], num_groups: int
    ) -> None:
        super().__init__()
        self.conv_in = _CausalConv(channels, widths[0], 3, bias=False)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            self.block_res_blocks.append(_res_blocks(before, width, num_res_blocks, num_groups))
            if level < len(widths) - 1:
                self.conv_blocks.append(_CausalConv(width, width, 3, stride=2) if halve[level] else nn.Identity())
        self.res_blocks = _res_blocks(widths[-1], widths[-1], num_res_blocks, num_groups)
        self.norm1 = nn.GroupNorm(num_groups, widths[-1])
        self.conv2 = _CausalConv(widths[-1], 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = _run(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        y: Tensor = self.conv2(F.silu(self.norm1(_run(self.res_blocks, x))))
        return y


class _Decoder(nn.Module):
    def __init__(
        self, channels: int, widths: list[int], num_res_blocks: int, double: tuple[bool, ...], num_groups: int
    ) -> None:
        super().__init__()
        self.conv1 = _CausalConv(channels, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], num_res_blocks, num_groups)
        self.block_res_blocks, self.conv_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            above = widths[min(level + 1, len(widths) - 1)]
            self.block_res_blocks.append(_res_blocks(above, width, num_res_blocks, num_groups))
            if level > 0:
                self.conv_blocks.append(_CausalConv(width, 2 * width, 3) if double[level - 1] else nn.Identity())
        self._double = double
        self.norm1 = nn.GroupNorm(num_groups, widths[0])
        self.conv_out = _CausalConv(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = _run(self.res_blocks, self.conv1(x))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _run(self.block_res_blocks[level], x)
            if level > 0 and self._double[level - 1]:
                x = self.conv_blocks[level - 1](x)
                x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)  # (B, C, 2T, H, W)
        y: Tensor = self.conv_out(F.silu(self.norm1(x)))
        return y


def _res_blocks(channels: int, width: int, number: int, num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(_ResBlock(width if index else channels, width, num_groups) for index in range(number))


def _run(blocks: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        x = block(x)
    return x
