"""The encoder of an image autoencoder (diffusers' ``AutoencoderKL``), on a GPU about twice as fast.

Activations lie channels-last; what is between the convolutions are a few kernels of one pass each; attention of the
middle block, whose single head is too wide for fused kernels, is two products with a softmax between them. Nothing is
compiled for a size of pictures.

N pictures, C channels, S positions of the middle block.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D
from torch import Tensor, nn

MAX_SCORES = 2**28
"""Attention scores at a time."""

PRECISIONS = (torch.float32, torch.bfloat16)


def why_not(vae: Any) -> str | None:
    """Returns by what an autoencoder differs from those that :func:`make_fast` knows, or None."""
    if type(vae) is not AutoencoderKL or type(vae.encoder) is not Encoder:
        return f"{type(vae).__name__} is not an AutoencoderKL"
    if vae.dtype not in PRECISIONS:
        return f"{vae.dtype} is not one of {', '.join(map(str, PRECISIONS))}"
    encoder = vae.encoder
    for block in encoder.down_blocks:
        if type(block) is not DownEncoderBlock2D:
            return f"block {type(block).__name__} is not a DownEncoderBlock2D"
        for down in block.downsamplers or ():
            if not down.use_conv or down.padding != 0 or down.norm is not None or down.conv.kernel_size != (3, 3):
                return "a downsampler is not a padded convolution of 3x3"
    for resnet in (*(part for block in encoder.down_blocks for part in block.resnets), *encoder.mid_block.resnets):
        if type(resnet) is not ResnetBlock2D or not isinstance(resnet.nonlinearity, nn.SiLU):
            return "a residual block is not a ResnetBlock2D with SiLU"
        if (
            resnet.output_scale_factor != 1
            or resnet.time_emb_proj is not None
            or resnet.time_embedding_norm != "default"
        ):
            return "a residual block is scaled or takes a time"
    for attention in encoder.mid_block.attentions:
        if attention is not None and (
            attention.heads != 1 or attention.group_norm is None or attention.rescale_output_factor != 1
        ):
            return "attention of the middle block has several heads or no norm"
    return None


def make_fast(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Returns a function from pixels (N, 3, height, width), in [-1, 1], to moments (N, 2C, h, w).

    It gives what ``vae.quant_conv(vae.encoder(pixels))`` gives, on the device and in the type that the weights have
    now. The model is left as it is: the function holds copies of the encoder's weights in its own layout.

    Raises:
        ValueError: if :func:`why_not` says so.
    """
    if reason := why_not(vae):
        raise ValueError(f"{reason}: use the model itself")
    return _FastEncoder(vae)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Resnet:
    norm1: nn.GroupNorm
    conv1: Tensor
    bias1: Tensor
    norm2: nn.GroupNorm
    conv2: Tensor
    shortcut: Tensor | None
    bias2: Tensor
    """Of the sum: of the second convolution, and of what is added to it."""
    bias_before: Tensor | None
    """Of the convolution before, not yet added to what comes in."""
    down: Tensor | None
    """The convolution that halves what comes out, if one follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    norm: nn.GroupNorm
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor


class _FastEncoder:
    """The encoder as a chain of residual blocks and attention."""

    def __init__(self, vae: AutoencoderKL) -> None:
        encoder = vae.encoder
        uses_triton = vae.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        self._step: Any = _TritonSteps() if uses_triton else _TorchSteps()
        self._conv_in = _weight(encoder.conv_in)
        self._chain: list[_Resnet | _Attention] = []
        bias: Tensor | None = _bias(encoder.conv_in)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                down = block.downsamplers[0].conv if block.downsamplers and resnet is block.resnets[-1] else None
                self._chain.append(_resnet(resnet, bias, down))
                bias = None if down is None else _bias(down)
        middle = encoder.mid_block
        self._chain.append(_resnet(middle.resnets[0], bias, None))
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                self._chain.append(_attention(attention))
            self._chain.append(_resnet(resnet, None, None))
        self._norm_out = encoder.conv_norm_out
        self._conv_out, self._bias_out = _weight(encoder.conv_out), encoder.conv_out.bias.detach()
        self._quant = None
        if vae.quant_conv is not None:
            self._quant = (_weight(vae.quant_conv), vae.quant_conv.bias.detach())

    def __call__(self, pixels: Tensor) -> Tensor:
        step = self._step
        x, partial = step.first_convolution(pixels.contiguous(), self._conv_in)
        for part in self._chain:
            x, partial = self._resnet(x, partial, part) if isinstance(part, _Resnet) else self._attend(x, partial, part)
        x = step.normalise(x, partial, None, self._norm_out, silu=True)
        x = F.conv2d(x, self._conv_out, self._bias_out, padding=1)
        return x if self._quant is None else F.conv2d(x, *self._quant)

    def _resnet(self, x: Tensor, partial: Tensor | None, part: _Resnet) -> tuple[Tensor, Tensor | None]:
        step = self._step
        h = F.conv2d(step.normalise(x, partial, part.bias_before, part.norm1, silu=True), part.conv1, padding=1)
        h = step.normalise(h, step.statistics(h), part.bias1, part.norm2, silu=True)
        h = F.conv2d(h, part.conv2, padding=1)
        residual = x if part.shortcut is None else F.conv2d(x, part.shortcut)
        if part.down is None:
            return step.add(h, residual, part.bias2)
        h = F.conv2d(step.add_padded(h, residual, part.bias2), part.down, stride=2)
        return h, step.statistics(h)

    def _attend(self, x: Tensor, partial: Tensor | None, part: _Attention) -> tuple[Tensor, Tensor | None]:
        normed = self._step.normalise(x, partial, None, part.norm, silu=False)
        channels = normed.shape[1]
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)  # (N, S, C)
        q, k, v = F.linear(tokens, part.qkv, part.qkv_bias).chunk(3, dim=2)
        attended = torch.empty_like(tokens)
        positions = tokens.shape[1]
        pictures = max(1, MAX_SCORES // positions**2)
        queries = max(1, min(positions, MAX_SCORES // positions))
        for at in range(0, len(tokens), pictures):
            some = slice(at, at + pictures)
            keys, values = k[some].transpose(1, 2), v[some]
            for first in range(0, positions, queries):
                asked = slice(first, first + queries)
                weights = self._step.attention_weights(q[some, asked], keys, 1 / math.sqrt(channels))
                attended[some, asked] = torch.bmm(weights, values)
        out = F.linear(attended, part.out).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return self._step.add(out, x, part.out_bias)


def _resnet(module: ResnetBlock2D, bias_before: Tensor | None, down: nn.Conv2d | None) -> _Resnet:
    shortcut, bias = None, _bias(module.conv2)
    if module.conv_shortcut is not None:
        shortcut = _weight(module.conv_shortcut)
        if module.conv_shortcut.bias is not None:
            bias = bias + _bias(module.conv_shortcut)
    if bias_before is not None:
        bias = bias + (bias_before if shortcut is None else shortcut.float().flatten(1) @ bias_before)
    return _Resnet(
        norm1=module.norm1,
        conv1=_weight(module.conv1),
        bias1=_bias(module.conv1),
        norm2=module.norm2,
        conv2=_weight(module.conv2),
        shortcut=shortcut,
        bias2=bias,
        bias_before=bias_before,
        down=None if down is None else _weight(down),
    )


def _attention(module: Any) -> _Attention:
    parts = (module.to_q, module.to_k, module.to_v)
    return _Attention(
        norm=module.group_norm,
        qkv=torch.cat([part.weight.detach() for part in parts]),
        qkv_bias=torch.cat([part.bias.detach() for part in parts]),
        out=module.to_out[0].weight.detach(),
        out_bias=module.to_out[0].bias.detach().float(),
    )


def _weight(conv: nn.Conv2d) -> Tensor:
    return conv.weight.detach().contiguous(memory_format=torch.channels_last)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias.detach().float()


class _TorchSteps:
    """What lies between the convolutions, in plain torch; norms see what they normalise, so statistics are None."""

    def first_convolution(self, pixels: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        return F.conv2d(pixels.contiguous(memory_format=torch.channels_last), weight, padding=1), None

    def statistics(self, x: Tensor) -> None:
        return None

    def normalise(self, x: Tensor, partial: None, bias: Tensor | None, norm: nn.GroupNorm, *, silu: bool) -> Tensor:
        shifted = x if bias is None else x + bias.to(x.dtype)[:, None, None]
        normed = norm(shifted)
        return F.silu(normed) if silu else normed

    def add(self, x: Tensor, residual: Tensor, bias: Tensor) -> tuple[Tensor, None]:
        return x + residual + bias.to(x.dtype)[:, None, None], None

    def add_padded(self, x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return F.pad(self.add(x, residual, bias)[0], (0, 1, 0, 1))

    def attention_weights(self, q: Tensor, keys: Tensor, factor: float) -> Tensor:
        return torch.softmax(torch.bmm(q, keys).float() * factor, dim=2).to(q.dtype)


class _TritonSteps:
    """What lies between the convolutions, a kernel each."""

    def __init__(self) -> None:
        from shared.encoders import fast_vae_kernels as kernels  # imports triton, which is there with CUDA only

        self.first_convolution = kernels.first_convolution
        self.statistics, self.normalise = kernels.statistics, kernels.normalise
        self.add, self.add_padded = kernels.add, kernels.add_padded
        self._softmax = kernels.softmax

    def attention_weights(self, q: Tensor, keys: Tensor, factor: float) -> Tensor:
        is_exact = q.dtype == torch.float32
        scores = torch.bmm(q, keys) if is_exact else torch.bmm(q, keys, out_dtype=torch.float32)
        return self._softmax(scores, factor, q.dtype)
