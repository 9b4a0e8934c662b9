# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""The parts of which the diffusion transformers are made. The parameters' names are those of the published weights.

Letters: B batch, N tokens, L caption tokens, D width, H heads.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from train.model.attention import AttentionBackend, KeyMask, attention
from train.model.positions import timestep_sinusoid

LAYER_NORM_EPS = 1e-6


def modulate(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "B 1 D"], scale: Float[Tensor, "B 1 D"]
) -> Float[Tensor, "B N D"]:
    """Returns ``x * (1 + scale) + shift``."""
    return x * (1 + scale) + shift


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
    """Attention among the tokens of each sequence."""

    def __init__(self, hidden_size: int, num_heads: int, backend: AttentionBackend | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, D/H)
        q, k, v = qkv.unbind(2)
        return self.proj(attention(q, k, v, backend=self.backend).flatten(2))


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
        self, x: Float[Tensor, "B N D"], y: Float[Tensor, "B L D"], keys: KeyMask | None
    ) -> Float[Tensor, "B N D"]:
        q = self.q_linear(x).unflatten(2, (self.num_heads, -1))
        k, v = self.kv_linear(y).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v, keys=keys, backend=self.backend).flatten(2))


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel: one token a patch."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B N D"]:
        return self.proj(x).flatten(2).transpose(1, 2)


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
        self.norm_final = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Float[Tensor, "B N D"], t: Float[Tensor, "B D"]) -> Float[Tensor, "B N P"]:
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
