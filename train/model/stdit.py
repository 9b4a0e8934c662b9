# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""STDiT as in Open-Sora v1.0: each block attends within a frame, then along time, then to the caption.

The published weights load by name. What differs on purpose: any size in one model (positions are made for the size at
hand), the timestep's sinusoid in float32, and no random number is drawn here: who drops captions says which.

Letters: B batch, C channels, T frames, S tokens of a frame, L caption tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.errors import InputError
from train.model.attention import AttentionBackend, KeyMask
from train.model.config import STDiTConfig
from train.model.layers import (
    LAYER_NORM_EPS,
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    Mlp,
    PatchEmbedding,
    SelfAttention,
    TimestepEmbedder,
    modulate,
)
from train.model.positions import spatial_positions, temporal_positions
from train.ops.cpu_bfloat16 import checkpoint_contexts

_KEPT_AS_MADE = ("scale_shift_table", "x_embedder.proj.bias")
_ZERO_WEIGHTS = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
_NORMAL_WEIGHTS = (
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "t_block.1.weight",
    "y_proj.fc1.weight",
    "y_proj.fc2.weight",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modulation:
    """What the timestep does to one block; each (B, 1, D)."""

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class STDiTBlock(nn.Module):
    """Space, time, caption, MLP: each added to the tokens, the first two under one gate."""

    def __init__(self, config: STDiTConfig, backend: AttentionBackend | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, config.num_heads, backend)
        self.attn_temp = SelfAttention(width, config.num_heads, backend)
        self.cross_attn = CrossAttention(width, config.num_heads, backend)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(width, config.mlp_size, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "B T*S D"],
        y: Float[Tensor, "B L D"],
        t: Float[Tensor, "B 6*D"],
        keys: KeyMask | None,
        num_frames: int,
        time_positions: Float[Tensor, "1 T D"] | None,
    ) -> Float[Tensor, "B T*S D"]:
        table = (self.scale_shift_table[None] + t.unflatten(1, (6, -1))).chunk(6, dim=1)
        m = Modulation(
            shift_msa=table[0],
            scale_msa=table[1],
            gate_msa=table[2],
            shift_mlp=table[3],
            scale_mlp=table[4],
            gate_mlp=table[5],
        )
        B = x.shape[0]
        h = modulate(self.norm1(x), m.shift_msa, m.scale_msa)
        h = self.attn(h.unflatten(1, (num_frames, -1)).flatten(0, 1))  # (B*T, S, D)
        x = x + m.gate_msa * h.unflatten(0, (B, num_frames)).flatten(1, 2)

        h = x.unflatten(1, (num_frames, -1)).transpose(1, 2).flatten(0, 1)  # (B*S, T, D)
        if time_positions is not None:
            h = h + time_positions
        h = self.attn_temp(h)
        x = x + m.gate_msa * h.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)

        x = x + self.cross_attn(x, y, keys)
        return x + m.gate_mlp * self.mlp(modulate(self.norm2(x), m.shift_mlp, m.scale_mlp))


class STDiT(nn.Module):
    """Space-time diffusion transformer.

    Args:
        config: The architecture.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: Keep the blocks' inputs only and compute the rest again in the backward pass.
    """

    def __init__(
        self,
        config: STDiTConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        width, patch = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbedding(config.in_channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width, config.model_max_length)
        self.blocks = nn.ModuleList(STDiTBlock(config, attention_backend) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, patch[0] * patch[1] * patch[2] * config.out_channels)
        self.register_load_state_dict_pre_hook(_adapt_published_state)
        self._initialize_weights()

    def forward(
        self,
        x: Float[Tensor, "B C T H W"],
        timestep: Float[Tensor, " B"],
        y: Float[Tensor, "B 1 L Y"],
        mask: Int[Tensor, "B L"] | None = None,
        *,
        drop_caption: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B O T H W"]:
        """Returns the prediction in float32: the noise and, if ``pred_sigma``, as many channels for the variance.

        Args:
            x: Noised latents.
            timestep: From 0 to 999.
            y: Caption embeddings, padded to a common length of at most ``model_max_length``.
            mask: Nonzero at valid caption tokens; all are valid if None.
            drop_caption: True where the null caption replaces ``y``; the mask stays.

        Raises:
            InputError: if the patch does not divide x, or the captions are too long.
        """
        frames, rows, columns = self.config.grid((x.shape[2], x.shape[3], x.shape[4]))
        if y.shape[2] > self.config.model_max_length:
            raise InputError(
                f"captions of {y.shape[2]} tokens, but model_max_length={self.config.model_max_length}: cut them"
            )
        dtype = self.x_embedder.proj.weight.dtype
        width, device = self.config.hidden_size, x.device
        space = spatial_positions(width, rows, columns, self.config.space_scale, device).to(dtype)
        time = temporal_positions(width, frames, self.config.time_scale, device).to(dtype)
        keys = None if mask is None else KeyMask(mask.bool())

        tokens = self.x_embedder(x.to(dtype)).unflatten(1, (frames, -1)) + space[:, None]
        tokens = tokens.flatten(1, 2)  # (B, T*S, D)
        t = self.t_embedder(timestep, dtype)
        t_modulation = self.t_block(t)
        captions = self.y_embedder(y.squeeze(1).to(dtype), drop_caption)
        for index, block in enumerate(self.blocks):
            run: Callable[..., Tensor] = block
            if self.activation_checkpointing:
                run = partial(checkpoint, block, use_reentrant=False, context_fn=checkpoint_contexts)
            tokens = run(tokens, captions, t_modulation, keys, frames, time if index == 0 else None)
        return self._unpatchify(self.final_layer(tokens, t), (frames, rows, columns)).float()

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Returns (B, O, T, H, W) from tokens whose values are ordered (patch_t, patch_h, patch_w, O)."""
        (t, h, w), (pt, ph, pw) = grid, self.config.patch_size
        x = x.view(-1, t, h, w, pt, ph, pw, self.config.out_channels)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, self.config.out_channels, t * pt, h * ph, w * pw)

    def _initialize_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(_KEPT_AS_MADE):
                continue
            if name.endswith(("bias", *_ZERO_WEIGHTS)):
                nn.init.zeros_(parameter)
            elif name.endswith(_NORMAL_WEIGHTS):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))


def _adapt_published_state(model: STDiT, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Makes published weights fit: positions dropped, the null caption cut or extended, PixArt's patches given a time.

    The rows by which the null caption is extended are those that the model was made with.
    """
    for name in ("pos_embed", "pos_embed_temporal"):
        state.pop(prefix + name, None)
    null_key, patch_key = prefix + "y_embedder.y_embedding", prefix + "x_embedder.proj.weight"
    own = model.y_embedder.y_embedding
    given = state.get(null_key)
    if given is not None and given.shape[0] != own.shape[0]:
        state[null_key] = torch.cat([given[: own.shape[0]], own[given.shape[0] :].to(given)])
    patches = state.get(patch_key)
    if patches is not None and patches.ndim == 4:
        state[patch_key] = patches.unsqueeze(2)
