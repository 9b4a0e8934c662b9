# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""STDiT as in Open-Sora v1.0: each block attends within a frame, then along time, then to the caption.

The published weights load by name. What differs on purpose: any size in one model (positions are made for the size at
hand), the timestep's sinusoid in float32, and no random number is drawn here: who drops captions says which.

Letters: B batch, C channels, T frames, S tokens of a frame, L caption tokens, D width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared.errors import InputError
from train.model.attention import AttentionBackend, KeyMask
from train.model.checkpointing import ActivationCheckpointing, checkpointed
from train.model.config import STDiTConfig
from train.model.layers import (
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    Mlp,
    PatchEmbedding,
    SpaceAttention,
    TimeAttention,
    TimestepEmbedder,
    unpatchify,
)
from train.model.layout import LayoutFor, TokenLayout, whole_layout
from train.model.positions import spatial_positions, temporal_positions
from train.ops.modulation import gate_add, gate_add_norm_modulate, norm_modulate

_KEPT_AS_MADE = ("scale_shift_table", "x_embedder.proj.bias")
_ZERO_WEIGHTS = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
_NORMAL_WEIGHTS = (
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "t_block.1.weight",
    "y_proj.fc1.weight",
    "y_proj.fc2.weight",
)


class STDiTBlock(nn.Module):
    """Space, time, caption, MLP: each added to the tokens, the first two under one gate.

    A block leaves its last addition to the next one, where it is one pass with the norm.
    """

    def __init__(self, config: STDiTConfig, backend: AttentionBackend | None) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = SpaceAttention(width, config.num_heads, backend)
        self.attn_temp = TimeAttention(width, config.num_heads, backend)
        self.cross_attn = CrossAttention(width, config.num_heads, backend)
        self.mlp = Mlp(width, config.mlp_size, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "B T S D"],
        h: Float[Tensor, "B T S D"] | None,
        gate: Float[Tensor, "B 1 D"] | None,
        y: Float[Tensor, "B L D"],
        t: Float[Tensor, "B 1 6*D"],
        keys: KeyMask | None,
        layout: TokenLayout,
        time_positions: Float[Tensor, "1 T 1 D"] | None,
    ) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"], Float[Tensor, "B 1 D"]]:
        """Returns the tokens, and what is still to be added to them with its gate.

        Args:
            x: Tokens.
            h: What the block before left to be added; None in the first block.
            gate: Of h.
            y: Captions.
            t: The timestep's modulation.
            keys: Valid caption tokens.
            layout: Where the tokens lie.
            time_positions: Added to what attends along time.
        """
        modulation = self.scale_shift_table + t.unflatten(2, (6, -1))  # (B, 1, 6, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        if h is None:
            h = norm_modulate(x, shift_msa, scale_msa)
        else:
            x, h = gate_add_norm_modulate(x, h, gate, shift_msa, scale_msa)
        x = gate_add(x, layout.along_space(h, self.attn), gate_msa)

        def along_time(x: Tensor) -> Tensor:
            return self.attn_temp(x if time_positions is None else x + time_positions)

        x = gate_add(x, layout.along_time(x, along_time), gate_msa)
        x, h = gate_add_norm_modulate(x, self.cross_attn(x, y, keys), None, shift_mlp, scale_mlp)
        return x, self.mlp(h), gate_mlp


class STDiT(nn.Module):
    """Space-time diffusion transformer.

    Args:
        config: The architecture.
        attention_backend: The attention kernel; None chooses by device and shape.
        activation_checkpointing: What blocks keep for the backward pass.

    Attributes:
        layout_for: Where the tokens of a forward pass lie; set it to spread them over ranks.
    """

    wants_size = False
    """Whether the forward pass takes ``fps``, ``height`` and ``width``."""

    def __init__(
        self,
        config: STDiTConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.layout_for: LayoutFor = whole_layout
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

        layout = self.layout_for(x.shape[0], frames, rows * columns)
        tokens = layout.split(self.x_embedder(x.to(dtype)) + space[:, None])
        t = self.t_embedder(timestep, dtype)[:, None]
        modulation = self.t_block(t)
        captions = self.y_embedder(y.squeeze(1).to(dtype), drop_caption)
        h = gate = None
        for index, block in enumerate(self.blocks):
            positions = time[:, :, None] if index == 0 else None
            run = checkpointed(block, self.activation_checkpointing)
            tokens, h, gate = run(tokens, h, gate, captions, modulation, keys, layout, positions)
        values = layout.merge(self.final_layer(tokens, h, gate, t))
        return unpatchify(values, (frames, rows, columns), self.config.patch_size).float()

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
