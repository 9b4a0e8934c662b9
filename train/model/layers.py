# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The parts of which the diffusion transformers are made. The parameters' names are those of the published weights.

Letters: B batch, T frames, S tokens of a frame, L caption tokens, D width, H heads, P head width, V values of a patch,
G groups of frames that share a modulation (1 or T).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from train.model.attention import AttentionBackend, KeyMask, attention
from train.model.positions import timestep_sinusoid
from train.ops.modulation import gate_add_norm_modulate
from train.ops.time_attention import time_attention


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """The weights of attention among tokens; who meets whom is the subclasses'."""

    def __init__(self, hidden_size: int, num_heads: int, backend: AttentionBackend | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def heads(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S 3 H P"]:
        """Returns queries, keys and values."""
        return self.qkv(x).unflatten(3, (3, self.num_heads, -1))


class SpaceAttention(SelfAttention):
    """Attention among the tokens of each frame."""

    def forward(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S D"]:
        q, k, v = self.heads(x).flatten(0, 1).unbind(2)  # (B*T, S, H, P) each
        return self.proj(attention(q, k, v, backend=self.backend).reshape(x.shape))


class TimeAttention(SelfAttention):
    """Attention along time among the tokens of each place of the frame."""

    def forward(self, x: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S D"]:
        return self.proj(time_attention(self.heads(x)).flatten(3))


class CrossAttention(nn.Module):
    """Attention from the tokens of a sample to its own valid caption tokens."""

    def __init__(self, hidden_size: int, num_heads: int, backend: AttentionBackend | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: Float[Tensor, "B T S D"], y: Float[Tensor, "B L D"], keys: KeyMask | None
    ) -> Float[Tensor, "B T S D"]:
        q = self.q_linear(x).flatten(1, 2).unflatten(2, (self.num_heads, -1))
        k, v = self.kv_linear(y).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v, keys=keys, backend=self.backend).reshape(x.shape))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: one token a patch."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B C T*pt H*ph W*pw"]) -> Float[Tensor, "B T S D"]:
        return self.proj(x).flatten(3).permute(0, 2, 3, 1)


def unpatchify(
    x: Float[Tensor, "B T S V"], grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Float[Tensor, "B O T*pt H*ph W*pw"]:
    """Returns the videos of tokens whose values are ordered (patch_t, patch_h, patch_w, O).

    Args:
        x: Tokens with the values of their patches.
        grid: Tokens along frames, rows and columns.
        patch_size: Latent frames, rows and columns of a token.
    """
    (t, h, w), (pt, ph, pw) = grid, patch_size
    x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], -1, t * pt, h * ph, w * pw)


class TimestepEmbedder(nn.Module):
    """The timestep's sinusoid through an MLP."""

    sinusoid_size = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.sinusoid_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Float[Tensor, " B"], dtype: torch.dtype) -> Float[Tensor, "B D"]:
        return self.mlp(timestep_sinusoid(timestep, self.sinusoid_size).to(dtype))


class CaptionEmbedder(nn.Module):
    """Caption embeddings through an MLP; a dropped caption is replaced by the null caption, token by token."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, model_max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(model_max_length, caption_channels) / caption_channels**0.5)

    def forward(self, y: Float[Tensor, "B L C"], drop_caption: Bool[Tensor, " B"] | None) -> Float[Tensor, "B L D"]:
        if drop_caption is not None:
            y = torch.where(drop_caption[:, None, None], self.y_embedding[: y.shape[1]].to(y.dtype), y)
        return self.y_proj(y)


class FinalLayer(nn.Module):
    """A modulated norm and the projection to the values of a patch."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        x: Float[Tensor, "B T S D"],
        h: Float[Tensor, "B T S D"],
        gate: Float[Tensor, "B G D"],
        t: Float[Tensor, "B G D"],
    ) -> Float[Tensor, "B T S V"]:
        """Returns the values of each token's patch, after adding ``gate * h``, which the last block left to it."""
        shift, scale = (self.scale_shift_table + t[:, :, None]).unbind(2)
        _, h = gate_add_norm_modulate(x, h, gate, shift, scale)
        return self.linear(h)
