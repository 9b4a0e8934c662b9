# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""DiT: attention among all tokens of a sample. For videos with captions, and, as published, for images with labels.

The model with captions is PixArt-alpha (arXiv 2310.00426) with a time axis: one modulation for all blocks, caption
attention in each, fixed positions in space and, from a clip's second frame on, in time. The model with class labels is
that of the DiT paper (arXiv 2212.09748): each block makes its own modulation from timestep and label. Its published
weights load by name.

Letters: B batch, C channels, T frames, S tokens of a frame, L caption tokens, D width.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared.errors import InputError
from train.model.attention import AttentionBackend
from train.model.attention_layers import FullAttention
from train.model.blocks import Block, TransformerBlock
from train.model.checkpointing import ActivationCheckpointing
from train.model.config import DiTConfig
from train.model.initial import initialise
from train.model.layers import CaptionEmbedder, FinalLayer, LabelEmbedder, Linear, Mlp, Stream, enter, rows_for
from train.model.layout import TokenLayout
from train.model.positions import spatial_positions, temporal_positions
from train.model.transformer import DiffusionTransformer
from train.ops.modulation import gate_add_norm_modulate

_NORMAL_WEIGHTS = (
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "t_block.1.weight",
    "y_proj.fc1.weight",
    "y_proj.fc2.weight",
    "embedding_table.weight",
)


class DiT(DiffusionTransformer):
    """Diffusion transformer of videos with captions. The arguments are those of :class:`DiffusionTransformer`."""

    config: DiTConfig

    def __init__(
        self,
        config: DiTConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
        width = config.hidden_size
        self.t_block = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config, FullAttention(config, attention_backend), attention_backend, activation_checkpointing
            )
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config)
        initialise(
            self,
            as_made=("scale_shift_table", "x_embedder.proj.bias"),
            zero=("cross_attn.proj.weight", "final_layer.linear.weight"),
            normal=_NORMAL_WEIGHTS,
        )

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
        space = spatial_positions(config.hidden_size, rows, columns, space_scale, x.device)
        time = temporal_positions(config.hidden_size, frames, time_scale, x.device)
        time = time - time[:, :1]  # an image, like a clip's first frame, has none: PixArt-alpha's weights know none
        positions = (space[:, None] + time[:, :, None]).to(self.dtype)  # (1, T, S, D)

        t = self.t_embedder(timestep, self.dtype)[:, None]
        modulation = self.t_block(t)
        captions, keys = self.y_embedder(y, mask, drop_caption, self.dtype)
        stream: Stream = (layout.split(self.x_embedder(x.to(self.dtype)) + positions), None, None)
        for block in self.blocks:
            stream = block(stream, captions, modulation, keys, layout)
        return self.to_video(layout.merge(self.final_layer(stream, t)), x)


class LabelBlock(Block):
    """Attention and MLP, modulated by timestep and label through a product of the block's own (adaLN-zero)."""

    def __init__(
        self, config: DiTConfig, backend: AttentionBackend | None, checkpointing: ActivationCheckpointing
    ) -> None:
        super().__init__(checkpointing)
        width = config.hidden_size
        self.attn = FullAttention(config, backend)
        self.mlp = Mlp(width, config.mlp_size, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def compute(self, stream: Stream, condition: Float[Tensor, "B 1 D"], layout: TokenLayout) -> Stream:
        """Returns the stream after this block.

        Args:
            stream: From the block before.
            condition: Embedding of timestep and label.
            layout: Where the tokens lie.
        """
        modulation = self.adaLN_modulation(condition)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        rows = self.attn.rows_for(stream[0], layout)
        x, h = enter(stream, shift_msa, scale_msa, rows)
        h = self.attn(h, layout, rows)
        rows = rows_for(self.mlp.fc1, x)
        x, h = gate_add_norm_modulate(x, h, gate_msa, shift_mlp, scale_mlp, rows)
        return x, self.mlp(h, rows), gate_mlp


class LabelFinalLayer(nn.Module):
    """A norm, modulated by timestep and label, and the projection to the values of a patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = Linear(width, config.patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, stream: Stream, condition: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B T S V"]:
        """Returns the values of each token's patch."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=2)
        _, h = enter(stream, shift, scale)
        return self.linear(h)


class LabelDiT(DiffusionTransformer):
    """Diffusion transformer of images with class labels. The arguments are those of :class:`DiffusionTransformer`."""

    config: DiTConfig

    def __init__(
        self,
        config: DiTConfig,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
        self.y_embedder = LabelEmbedder(config)
        self.blocks = nn.ModuleList(
            LabelBlock(config, attention_backend, activation_checkpointing) for _ in range(config.depth)
        )
        self.final_layer = LabelFinalLayer(config)
        initialise(
            self,
            as_made=("x_embedder.proj.bias",),
            zero=("adaLN_modulation.1.weight", "final_layer.linear.weight"),
            normal=_NORMAL_WEIGHTS,
        )

    def forward(
        self,
        x: Float[Tensor, "B C 1 H W"],
        timestep: Float[Tensor, " B"],
        y: Int[Tensor, " B"],
        mask: None = None,
        *,
        drop_caption: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B O 1 H W"]:
        """Returns the prediction in float32: the noise and, if ``pred_sigma``, as many channels for the variance.

        Args:
            x: Noised latents of images, of any size.
            timestep: From 0 to 999.
            y: Class labels, from 0 to ``num_classes - 1``.
            mask: Labels have none.
            drop_caption: True where the null label replaces ``y``.

        Raises:
            InputError: for more than one frame, or a mask, or labels to drop in a model that has no null label.
        """
        config = self.config
        frames, rows, columns = self.grid_of(x)
        if frames != 1 or mask is not None:
            raise InputError(
                "a DiT with num_classes is for images of one frame, without a caption mask: found "
                f"{frames} frames{' and a mask' if mask is not None else ''}"
            )
        layout = self.layout_for(x.shape[0], frames, rows * columns)
        space_scale = config.space_scale_of(rows, columns)
        space = spatial_positions(config.hidden_size, rows, columns, space_scale, x.device).to(self.dtype)
        condition = (self.t_embedder(timestep, self.dtype) + self.y_embedder(y, drop_caption))[:, None]
        stream: Stream = (layout.split(self.x_embedder(x.to(self.dtype)) + space[:, None]), None, None)
        for block in self.blocks:
            stream = block(stream, condition, layout)
        return self.to_video(layout.merge(self.final_layer(stream, condition)), x)
