# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""STDiT as in Open-Sora v1.0: each block attends within a frame, then along time, then to the caption.

The published weights load by name. What differs on purpose: any size in one model (positions are made for the size at
hand), the timestep's sinusoid in float32, and no random number is drawn here: who drops captions says which.

Letters: B batch, C channels, T frames, S tokens of a frame, L caption tokens, D width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.model.attention import AttentionBackend, KeyMask
from train.model.attention_layers import CrossAttention, SpaceAttention, TimeAttention
from train.model.blocks import Block
from train.model.checkpointing import ActivationCheckpointing
from train.model.config import STDiTConfig
from train.model.initial import initialise
from train.model.layers import CaptionEmbedder, FinalLayer, Linear, Mlp, Stream, enter, rows_for
from train.model.layout import TokenLayout
from train.model.positions import spatial_positions, temporal_positions
from train.model.transformer import DiffusionTransformer
from train.ops.modulation import gate_add_norm_modulate, gate_add_twice

_KEPT_AS_MADE = ("scale_shift_table", "x_embedder.proj.bias")
_ZERO_WEIGHTS = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
_NORMAL_WEIGHTS = (
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "t_block.1.weight",
    "y_proj.fc1.weight",
    "y_proj.fc2.weight",
)


class STDiTBlock(Block):
    """Space, time, caption, MLP: each added to the tokens, the first two under one gate."""

    def __init__(
        self, config: STDiTConfig, backend: AttentionBackend | None, checkpointing: ActivationCheckpointing
    ) -> None:
        super().__init__(checkpointing)
        width = config.hidden_size
        self.attn = SpaceAttention(config, backend)
        self.attn_temp = TimeAttention(config, backend)
        self.cross_attn = CrossAttention(config, backend)
        self.mlp = Mlp(width, config.mlp_size, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def compute(
        self,
        stream: Stream,
        y: Float[Tensor, "B L D"],
        t: Float[Tensor, "B 1 6*D"],
        keys: KeyMask | None,
        layout: TokenLayout,
        time_positions: Float[Tensor, "1 T 1 D"] | None,
    ) -> Stream:
        """Returns the stream after this block.

        Args:
            stream: From the block before.
            y: Captions.
            t: The timestep's modulation.
            keys: Valid caption tokens.
            layout: Where the tokens lie.
            time_positions: Added to what attends along time.
        """
        modulation = self.scale_shift_table + t.view(*t.shape[:2], 6, -1)  # (B, 1, 6, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(2)
        rows = self.attn.rows_for(stream[0], layout)
        x, h = enter(stream, shift_msa, scale_msa, rows)
        h = self.attn(h, layout, rows)
        rows = self.attn_temp.rows_for(x, layout) if time_positions is None else None
        x, h = gate_add_twice(x, h, gate_msa, rows, parcels=self.attn_temp.parcels_for(x, layout))
        h = self.attn_temp(h, layout, rows, positions=time_positions)
        rows = rows_for(self.cross_attn.q_linear, x)
        x, h = gate_add_twice(x, h, gate_msa, rows)
        h = self.cross_attn(h, y, keys, rows)
        rows = rows_for(self.mlp.fc1, x)
        x, h = gate_add_norm_modulate(x, h, None, shift_mlp, scale_mlp, rows)
        return x, self.mlp(h, rows), gate_mlp


class STDiT(DiffusionTransformer):
    """Space-time diffusion transformer. The arguments are those of :class:`DiffusionTransformer`."""

    config: STDiTConfig

    def __init__(
        self,
        config: STDiTConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
        width = config.hidden_size
        self.t_block = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(
            STDiTBlock(config, attention_backend, activation_checkpointing) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        initialise(self, as_made=_KEPT_AS_MADE, zero=_ZERO_WEIGHTS, normal=_NORMAL_WEIGHTS)

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
            x: Noised latents, of any size.
            timestep: From 0 to 999.
            y: Caption embeddings, padded to a common length of at most ``model_max_length``.
            mask: Nonzero at valid caption tokens; all are valid if None.
            drop_caption: True where the null caption replaces ``y``; the mask stays.

        Raises:
            InputError: if the captions are too long.
        """
        config = self.config
        frames, rows, columns = self.grid_of(x)
        layout = self.layout_for(x.shape[0], frames, rows * columns)
        space_scale, time_scale = config.space_scale_of(rows, columns), config.time_scale_of(frames)
        space = spatial_positions(config.hidden_size, rows, columns, space_scale, x.device).to(self.dtype)
        time = temporal_positions(config.hidden_size, frames, time_scale, x.device).to(self.dtype)

        t = self.t_embedder(timestep, self.dtype)[:, None]
        modulation = self.t_block(t)
        captions, keys = self.y_embedder(y, mask, drop_caption, self.dtype)
        stream: Stream = (layout.split(self.x_embedder(x.to(self.dtype)) + space[:, None]), None, None)
        for index, block in enumerate(self.blocks):
            stream = block(stream, captions, modulation, keys, layout, time[:, :, None] if index == 0 else None)
        return self.to_video(layout.merge(self.final_layer(stream, t)), x)
