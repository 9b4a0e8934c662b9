# ruff: noqa: F722  (jaxtyping's shapes are not forward references)
"""STDiT3 as in Open-Sora v1.2: blocks of attention within a frame and along time in turn, each with its own caption
attention and MLP.

The published weights load by name. What differs on purpose: a sample's positions come from its own size, not from that
of the batch's first sample; the timestep's and the frame rate's sinusoids are in float32; ``rope.freqs``, which are
fixed, are made anew in float32 rather than stored.

Letters: B batch, C channels, T frames, S tokens of a frame, L caption tokens, D width, G groups of frames that share a
modulation: 1 or T.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shared.errors import InputError
from train.model.attention import AttentionBackend
from train.model.attention_layers import SpaceAttention, TimeAttention
from train.model.blocks import Block, TransformerBlock
from train.model.checkpointing import ActivationCheckpointing
from train.model.config import STDiT3Config
from train.model.initial import initialise
from train.model.layers import CaptionEmbedder, FinalLayer, Linear, Stream, TimestepEmbedder
from train.model.layout import TokenLayout
from train.model.positions import rotary_angles, scaled_positions
from train.model.transformer import DiffusionTransformer

_KEPT_AS_MADE = (
    "scale_shift_table",
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "q_norm.weight",
    "k_norm.weight",
)
_NORMAL_WEIGHTS = ("fps_embedder.mlp.0.weight",)


class STDiT3(DiffusionTransformer):
    """Space-time diffusion transformer, third version. The arguments are those of :class:`DiffusionTransformer`."""

    wants_size = True
    config: STDiT3Config

    def __init__(
        self,
        config: STDiT3Config,
        *,
        attention_backend: AttentionBackend | None = None,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(config, attention_backend=attention_backend, activation_checkpointing=activation_checkpointing)
        width = config.hidden_size
        self.fps_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)

        def blocks(attention: type[SpaceAttention] | type[TimeAttention]) -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(
                    config,
                    attention(config, attention_backend, qk_norm=config.qk_norm),
                    attention_backend,
                    activation_checkpointing,
                )
                for _ in range(config.depth)
            )

        self.spatial_blocks = blocks(SpaceAttention)
        self.temporal_blocks = blocks(TimeAttention)
        self.final_layer = FinalLayer(config)
        zero = ["fps_embedder.mlp.2.weight"]
        for index in range(config.depth):
            zero += [f"temporal_blocks.{index}.{name}.weight" for name in ("attn.proj", "cross_attn.proj", "mlp.fc2")]
        initialise(self, as_made=_KEPT_AS_MADE, zero=tuple(zero), normal=_NORMAL_WEIGHTS)

    def transformer_blocks(self) -> list[Block]:
        """Returns the blocks in the order in which tokens go through them, space and time by turns."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair if isinstance(block, Block)]

    def forward(
        self,
        x: Float[Tensor, "B C T H W"],
        timestep: Float[Tensor, " B"],
        y: Float[Tensor, "B 1 L Y"],
        mask: Int[Tensor, "B L"] | None = None,
        x_mask: Bool[Tensor, "B T"] | None = None,
        fps: Float[Tensor, " B"] | None = None,
        height: Float[Tensor, " B"] | None = None,
        width: Float[Tensor, " B"] | None = None,
        *,
        drop_caption: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B O T H W"]:
        """Returns the prediction in float32: the velocity and, if ``pred_sigma``, as many channels that nobody reads.

        Args:
            x: Noised latents, of any size.
            timestep: From 0 to 1000.
            y: Caption embeddings, padded to a common length of at most ``model_max_length``.
            mask: Nonzero at valid caption tokens; all are valid if None.
            x_mask: False at frames that are given rather than generated: they are modulated as at timestep 0.
            fps: Frames a second of the clips; 120 for images.
            height: Of the clips, in pixels.
            width: Of the clips, in pixels.
            drop_caption: True where the null caption replaces ``y``; the mask stays.

        Raises:
            InputError: if the captions are too long, fps, height or width are missing, x_mask has another number of
                frames, or a patch has several.
        """
        if fps is None or height is None or width is None:
            raise InputError("STDiT3 is conditioned on fps, height and width: give all three, one value a sample")
        frames, rows, columns = self.grid_of(x)
        layout = self.layout_for(x.shape[0], frames, rows * columns)
        side = (height.to(x.device).float() * width.to(x.device).float()).sqrt() / self.config.input_sq_size
        space = scaled_positions(self.config.hidden_size, rows, columns, side).to(self.dtype)
        rope = rotary_angles(self.config.head_size, frames, x.device)

        t, modulation = self._modulation(timestep, fps.to(x.device), x_mask, frames, layout)
        captions, keys = self.y_embedder(y, mask, drop_caption, self.dtype)
        stream: Stream = (layout.split(self.x_embedder(x.to(self.dtype)) + space[:, None]), None, None)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            stream = spatial(stream, captions, modulation, keys, layout)
            stream = temporal(stream, captions, modulation, keys, layout, rope)
        return self.to_video(layout.merge(self.final_layer(stream, t)), x)

    def _modulation(
        self, timestep: Tensor, fps: Tensor, x_mask: Tensor | None, frames: int, layout: TokenLayout
    ) -> tuple[Float[Tensor, "B G D"], Float[Tensor, "B G 6*D"]]:
        """Returns the embedding of timestep and frame rate, and the blocks' modulation made of it."""
        rate = self.fps_embedder(fps, self.dtype)
        t = self.t_embedder(timestep, self.dtype) + rate
        if x_mask is None:
            return t[:, None], self.t_block(t[:, None])
        if self.config.patch_size[0] != 1:
            raise InputError(f"x_mask: patches of {self.config.patch_size[0]} frames cannot be given in part")
        if x_mask.shape[1] != frames:
            raise InputError(f"x_mask of {x_mask.shape[-1]} frames for latents of {frames}: give one value a frame")
        t_given = self.t_embedder(torch.zeros_like(timestep), self.dtype) + rate
        generated = x_mask.bool()[:, :, None]
        t_frames = torch.where(generated, t[:, None], t_given[:, None])
        modulation = torch.where(generated, self.t_block(t)[:, None], self.t_block(t_given)[:, None])
        return layout.split_frames(t_frames), layout.split_frames(modulation)
